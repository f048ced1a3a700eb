// Depthwise of tables that have a kernel of their own for planes with borders.
#pragma once

#include "kernels/depthwise.h"
#include "kernels/depthwise_strip.h"

// One vector of a unit, as strips take it.
template <class V>
struct Single : V {
  using Elem = float;
  using reg = typename V::reg;
  using In = reg;
  static constexpr bool kScalesAfter = false, kShortSums = false, kTies = false;
  static MNV4_INLINE const float* begins(const float* bias) { return bias; }
  static MNV4_INLINE reg begin(const float* p) { return V::load(p); }
  static MNV4_INLINE const float* hidden(const float* p) {
    asm("" : "+r"(p));
    return p;
  }
  // a pointer that moves: one register for all pixels of a row
  static MNV4_INLINE reg load_step(const float*& p, std::ptrdiff_t step) {
    const reg v = V::load(p);
    p = hidden(p + step);
    return v;
  }
  static MNV4_INLINE void store_step(float*& p, std::ptrdiff_t step, reg v) {
    V::store(p, v);
    p = const_cast<float*>(hidden(p + step));
  }
  template <int N>
  static MNV4_INLINE void finish(reg (&)[N], const float*, int) {}
  static MNV4_INLINE void gelu_unit(float* p) { gelu_inplace<V>(p, kUnit); }
};

template <class Cfg>
void depthwise_near(const DepthwiseArgs& d) {
  bordered(d) ? depthwise<Cfg>(d) : depthwise_of<Cfg, kUnknown>(d);
}
