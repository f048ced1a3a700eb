// The short way through a whole model: one native call from the module and its input to the output.
#pragma once

#include <pybind11/pybind11.h>

/// Adds `Lane` to the module.
void bind_lane(pybind11::module_& m);
