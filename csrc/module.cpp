// What is no tensor operator: those go through torch.library, so this file includes no torch header.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/capability.h"

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const auto capability : pyext::cpu::available_capabilities()) names.emplace_back(pyext::cpu::name(capability));
  return names;
}

std::map<std::string, std::string> build_info() {
  return {{"torch", PYEXT_BUILD_TORCH}, {"compiler", __VERSION__}, {"cuda", PYEXT_BUILD_CUDA}};
}

// Whether every dictionary still holds the very same keys and objects, in their order: `items` has them one after the
// other. Modules are compared with what was seen of them in every call, hundreds of dictionaries at batch size 1.
bool unchanged(const py::tuple& dictionaries, const py::tuple& items) {
  if (dictionaries.size() != items.size()) throw py::value_error("unchanged: one tuple of items for every dictionary");
  for (size_t i = 0; i < dictionaries.size(); ++i) {
    PyObject* dictionary = PyTuple_GET_ITEM(dictionaries.ptr(), i);
    PyObject* seen = PyTuple_GET_ITEM(items.ptr(), i);
    if (!PyDict_Check(dictionary) || !PyTuple_Check(seen))
      throw py::type_error("unchanged: expected dictionaries and tuples");
    if (2 * PyDict_Size(dictionary) != PyTuple_GET_SIZE(seen)) return false;
    Py_ssize_t place = 0, k = 0;
    PyObject *key, *value;
    for (; PyDict_Next(dictionary, &place, &key, &value); k += 2)
      if (key != PyTuple_GET_ITEM(seen, k) || value != PyTuple_GET_ITEM(seen, k + 1)) return false;
  }
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of pyext: registers the operators on import and tells how it was built.";
  m.def("cpu_capability", [] { return pyext::cpu::name(pyext::cpu::capability()); });
  m.def("cpu_capabilities", cpu_capabilities);
  m.def("build_info", build_info);
  m.def("unchanged", unchanged);
}
