#pragma once

#include <pybind11/pybind11.h>

/// Adds `MobileMQA` and `attention` to the module.
void bind_mqa(pybind11::module_& m);
