// "Are these tensors and modules as they were?" in one call: the check before every use of packed weights.
#pragma once

#include <pybind11/pybind11.h>

namespace mnv4 {

namespace py = pybind11;

class Guard;
/// Of a Python Guard, which the caller keeps alive.
Guard* guard_of(py::handle h);
/// As Guard.check(root, False) in Python.
int check(Guard& guard, py::handle root);

/// Adds `Guard` and `fingerprint` to the module.
void bind_guard(py::module_& m);

}  // namespace mnv4
