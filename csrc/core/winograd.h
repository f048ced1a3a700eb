// Dense 3 x 3 convolutions at stride 2 with 25 products for four outputs instead of 36: Winograd's F(2, 2) on the taps
// that meet even inputs, in both directions.
//
// In one direction two neighbouring outputs are y0 = A + B and y1 = B + C with
//   A = (x0 - x2) w0 + x1 w1,  B = x2 (w0 + w2),  C = (x4 - x2) w2 + x3 w1,
// in two directions four outputs come of nine such products, sums over all channels. Sums of weights are made in
// float64 when they are packed. Only differences and sums of two: the rounding error is that of the plain sum. What an
// output does not read does not reach it, but infinities and overflow in between turn into NaN: rows with a sum that is
// not finite are computed again, directly.
//
// Pairs of rows and columns are counted from the image's first, so that no division of the work changes a result.
#pragma once

#include "core/block.h"

namespace mnv4 {

bool winograd_serves(const BlockDesc& d);

/// Floats of the weights of a unit of 16 output channels, [plane][input channel][16].
inline std::ptrdiff_t winograd_unit(const BlockDesc& d) {
  return static_cast<std::ptrdiff_t>(kWinogradPlanes) * d.c_in * kUnit;
}

/// Folds as pack_gemm does; weight is [unit][plane][c_in][16].
void pack_winograd(const StageParams& p, int c_out, int c_in, float* weight);

/// Local scratch.
std::size_t winograd_floats(const BlockDesc& d, const Geometry& g);

/// Output row y again, directly; `to` says where it goes.
using DirectRow = void (*)(const BasicKernels<float>& k, const Team& t, const View& v, const BlockDesc& d,
                           const Geometry& g, int y, const GemmArgs& to);

/// As dense_rows, which passes `again`.
void winograd_rows(const BasicKernels<float>& k, const Team& t, const View& v, const BlockDesc& d, const Geometry& g,
                   int y0, int y1, const GemmArgs& to, const float* weight, DirectRow again);

}  // namespace mnv4
