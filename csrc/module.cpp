// Introspection only: tensor operators go through torch.library, so this file includes no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/capability.h"

namespace {

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const auto capability : pyext::cpu::available_capabilities()) names.emplace_back(pyext::cpu::name(capability));
  return names;
}

std::map<std::string, std::string> build_info() {
  return {{"torch", PYEXT_BUILD_TORCH}, {"compiler", __VERSION__}, {"cuda", PYEXT_BUILD_CUDA}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of pyext: registers the operators on import and tells how it was built.";
  m.def("cpu_capability", [] { return pyext::cpu::name(pyext::cpu::capability()); });
  m.def("cpu_capabilities", cpu_capabilities);
  m.def("build_info", build_info);
}
