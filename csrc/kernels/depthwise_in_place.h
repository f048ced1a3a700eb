// Depthwise of tables that have strips for everything.
#pragma once

#include "kernels/depthwise_strip.h"

template <class Cfg>
void depthwise(const BasicDepthwiseArgs<typename Cfg::Pair::Elem>& d) {
  const bool bordered = d.width == 0 && d.src_pix == kUnit && d.dst_pix == kUnit;
  bordered ? depthwise_of<Cfg, kUnit>(d) : depthwise_of<Cfg, kUnknown>(d);
}
