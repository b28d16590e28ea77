#include "cpu/capability.h"

#include <cstdlib>
#include <stdexcept>

namespace pyext::cpu {

const char* name(Capability capability) {
  switch (capability) {
    case Capability::kAvx512Bf16:
      return "avx512_bf16";
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Capability> available_capabilities() {
  std::vector<Capability> available{Capability::kBaseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    available.push_back(Capability::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      available.push_back(Capability::kAvx512);
      if (__builtin_cpu_supports("avx512bf16")) available.push_back(Capability::kAvx512Bf16);
    }
  }
#endif
  return available;
}

namespace {

Capability choose() {
  const std::vector<Capability> available = available_capabilities();
  const char* asked = std::getenv("PYEXT_CPU_CAPABILITY");
  if (!asked || !*asked) return available.back();
  std::string names;
  for (const Capability candidate : available) {
    if (std::string(asked) == name(candidate)) return candidate;
    names += std::string(names.empty() ? "" : ", ") + name(candidate);
  }
  throw std::runtime_error("PYEXT_CPU_CAPABILITY is '" + std::string(asked) + "', expected one of " + names +
                           " on this machine");
}

}  // namespace

Capability capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace pyext::cpu
