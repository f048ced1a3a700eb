#pragma once

#include <pybind11/pybind11.h>

/// Adds `MobileMQA` of elements T to the module, under this name.
template <class T>
void bind_mqa(pybind11::module_& m, const char* name);
/// Adds `attention`.
void bind_attention(pybind11::module_& m);
