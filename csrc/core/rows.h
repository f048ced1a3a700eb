// Rows of one unit: copied between zero borders, and the depthwise that reads them.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/block.h"

namespace mnv4 {

inline constexpr int kRowsAtOnce = 32;  // rows of one depthwise call, bounds its table of row offsets

/// Depthwise of `units` units for output pixels [p0, p1) of an image `w` wide; dst holds rows from that of pixel
/// `origin` on, dst_row apart (0: one after the other). row(y) is the offset of input row y, negative outside of the
/// image. `a` is that of the first unit; images and planes of the others are src_unit and dst_unit apart.
template <class T, class Row>
void depthwise_pixels(const BasicKernels<T>& k, BasicDepthwiseArgs<T> a, int top, int w, int origin, int p0, int p1,
                      Row row, int units = 1, std::ptrdiff_t src_unit = 0, std::ptrdiff_t dst_unit = 0) {
  const BasicDepthwiseArgs<T> first = a;
  const T* src = a.src;
  T* dst = a.dst;
  if (a.dst_row == 0) a.dst_row = static_cast<std::ptrdiff_t>(w) * kUnit;
  std::ptrdiff_t off[kRowsAtOnce * 5];
  a.row_off = off;
  for (int p = p0; p < p1; p += a.rows * a.cols) {
    const int y = p / w, x = p % w;
    const bool whole = x == 0 && p1 - p >= w;
    a.rows = whole ? std::min(kRowsAtOnce, (p1 - p) / w) : 1;
    a.cols = whole ? w : std::min(w - x, p1 - p);
    for (int r = 0; r < a.rows; ++r) {
      for (int ky = 0; ky < a.kernel; ++ky) off[r * a.kernel + ky] = row((y + r) * a.stride - top + ky);
    }
    a.src = src + x * a.stride * a.src_pix;
    a.dst = dst + (y - origin / w) * a.dst_row + x * a.dst_pix;
    a.first_col = x;
    a.weight = first.weight, a.bias = first.bias;
    for (int u = 0; u < units; ++u) {
      k.depthwise(a);
      a.src += src_unit, a.dst += dst_unit;
      a.weight += a.kernel * a.kernel * kUnit, a.bias += kEpilogue<T>;
    }
  }
}

/// Copies rows [lo, hi) of unit u (logical rows may lie outside of the image) between zero borders; with `scale` and
/// `shift` [16], what is copied is first multiplied and added to.
template <class T>
void load_rows(const BasicKernels<T>& k, const BasicView<T>& x, int u, int channels, const Geometry& g, int lo, int hi,
               T* dst, const float* scale = nullptr, const float* shift = nullptr) {
  const std::ptrdiff_t pitch = static_cast<std::ptrdiff_t>(g.left1 + g.w + g.right1) * kUnit;
  for (int y = std::max(lo, 0); y < std::min(hi, g.h); ++y) {
    T* row = dst + (y - lo) * pitch;
    std::memset(row, 0, sizeof(T) * g.left1 * kUnit);
    std::memset(row + (g.left1 + g.w) * kUnit, 0, sizeof(T) * g.right1 * kUnit);
    const T* src = x.p + u * x.unit + y * x.row;
    if (scale != nullptr) {
      k.load_affine(src, x.pix, x.chan, g.w, channels, row + g.left1 * kUnit, scale, shift);
    } else {
      k.load_unit(src, x.pix, x.chan, g.w, channels, row + g.left1 * kUnit);
    }
  }
}

}  // namespace mnv4
