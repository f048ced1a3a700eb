// "Are these tensors and modules as they were?" in one call: the check before every use of packed weights.
#pragma once

#include <pybind11/pybind11.h>

/// Adds `Guard` and `fingerprint` to the module.
void bind_guard(pybind11::module_& m);
