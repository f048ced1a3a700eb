// Depthwise of tables that have strips for everything.
#pragma once

#include "kernels/depthwise_strip.h"

template <class Cfg>
void depthwise(const BasicDepthwiseArgs<typename Cfg::StripVec::Elem>& d) {
  bordered(d) ? depthwise_of<Cfg, kUnit>(d) : depthwise_of<Cfg, kUnknown>(d);
}
