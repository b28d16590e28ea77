// csrc/cpu/team.h: many short regions on threads that come at different times, or never; a task that fails.
#include "cpu/team.h"

#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace {

using pyext::cpu::Team;

struct Region {
  std::vector<int64_t> done;
  int64_t value;
};

// Plain numbers, so that a task that is not seen as finished, or runs twice, is a race or a wrong sum.
int64_t program(Team& team, int64_t regions) {
  int64_t sum = 0;
  for (int64_t i = 0; i < regions; ++i) {
    Region region{std::vector<int64_t>(1 + i % 5), i};
    const auto work = [](void* context, int64_t task) {
      Region& r = *static_cast<Region*>(context);
      r.done[task] += r.value + task;
    };
    team.run(static_cast<int64_t>(region.done.size()), work, &region);
    sum += std::accumulate(region.done.begin(), region.done.end(), int64_t{0});
  }
  return sum;
}

int64_t expected(int64_t regions) {
  int64_t sum = 0;
  for (int64_t i = 0; i < regions; ++i) {
    const int64_t tasks = 1 + i % 5;
    sum += tasks * i + tasks * (tasks - 1) / 2;
  }
  return sum;
}

template <typename F>
void enter(Team& team, int threads, const F& program) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&] { team.enter(program); });
  team.enter(program);
  for (std::thread& other : others) other.join();
}

bool adds_up(int threads, int64_t regions) {
  Team team;
  int64_t sum = 0;
  enter(team, threads, [&] { sum = program(team, regions); });
  team.leave();
  return sum == expected(regions);
}

bool one_thread_after_the_other() {
  Team team;
  int64_t sum = 0;
  const auto run = [&] { sum += program(team, 100); };
  for (int i = 0; i < 3; ++i) team.enter(run);
  team.leave();
  return sum == expected(100);
}

bool a_failure_is_told(int threads) {
  Team team;
  bool went_on = false;
  enter(team, threads, [&] {
    team.run(
        4,
        [](void*, int64_t task) {
          if (task == 2) throw std::runtime_error("task 2");
        },
        nullptr);
    went_on = true;
  });
  try {
    team.leave();
  } catch (const std::runtime_error&) {
    return !went_on;
  }
  return false;
}

}  // namespace

int main() {
  int calls = 0;
  for (int threads = 1; threads <= 4; ++threads) {
    for (const int64_t regions : {0, 1, 1000}) {
      if (!adds_up(threads, regions)) return std::printf("wrong sum of %d threads\n", threads), 1;
      ++calls;
    }
    if (!a_failure_is_told(threads)) return std::printf("a failure was lost\n"), 1;
    ++calls;
  }
  if (!one_thread_after_the_other()) return std::printf("wrong sum of threads one after the other\n"), 1;
  std::printf("%d calls\n", calls + 1);
  return 0;
}
