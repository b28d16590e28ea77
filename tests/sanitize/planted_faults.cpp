// Faults that the sanitizers must report; the first argument picks one. Threads and memory as the kernels have them.
#include <cstdio>
#include <cstring>
#include <string>

#include "host.h"

namespace {

using pyext::sanitize::CallMemory;

int race(const pyext::cpu::Host& host) {
  int sum = 0;
  host.parallel(
      host.self, 2, [](void* context, int64_t task) { *static_cast<int*>(context) += static_cast<int>(task); }, &sum);
  return sum;
}

int past_the_end_of_shared_memory(const pyext::cpu::Host& host) {
  volatile float* x = static_cast<float*>(host.shared(host.self, 10 * sizeof(float)));
  x[10] = 1;
  return 0;
}

int past_the_end_of_scratch(const pyext::cpu::Host& host) {
  host.parallel(
      host.self, 1,
      [](void* context, int64_t) {
        volatile float* x = static_cast<float*>(static_cast<const pyext::cpu::Host*>(context)->scratch(40));
        x[0] = x[10];
      },
      const_cast<pyext::cpu::Host*>(&host));
  return 0;
}

int scratch_of_an_earlier_call(const pyext::cpu::Host& host) {
  volatile float* x = static_cast<float*>(host.scratch(40));
  host.scratch(80);
  return static_cast<int>(x[0]);
}

int shift_by_too_much(const pyext::cpu::Host& host) {
  volatile int bits = 40 + static_cast<int>(host.threads);
  return 1 << bits;
}

}  // namespace

int main(int, char** arguments) {
  CallMemory memory;
  const pyext::cpu::Host host = memory.host(2);
  const std::string fault = arguments[1];
  if (fault == "race") return race(host) & 0;
  if (fault == "past_the_end_of_shared_memory") return past_the_end_of_shared_memory(host);
  if (fault == "past_the_end_of_scratch") return past_the_end_of_scratch(host);
  if (fault == "scratch_of_an_earlier_call") return scratch_of_an_earlier_call(host) & 0;
  if (fault == "shift_by_too_much") return shift_by_too_much(host) & 0;
  std::printf("no fault %s\n", fault.c_str());
  return 2;
}
