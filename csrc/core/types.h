// Plain data shared by the planner, the executor and the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnv4 {

// Channels of one unit: activations are blocked [channels / 16][rows][columns][16] in every tier.
inline constexpr int kUnit = 16;

enum class Act : std::int32_t { none = 0, relu = 1, relu6 = 2, gelu = 3 };

inline constexpr int units_of(int channels) { return (channels + kUnit - 1) / kUnit; }

/// Floats rounded up to whole cache lines.
inline constexpr std::size_t round_line(std::size_t floats) { return (floats + 15) / 16 * 16; }

// Address of element (c, y, x): p + (c / 16) * unit + (c % 16) * chan + y * row + x * pix. Strides in floats.
struct View {
  float* p = nullptr;
  std::ptrdiff_t unit = 0, row = 0, pix = 0, chan = 1;
};

// The views of one image of a batch and the distance to the next image.
struct Tensor {
  View image;
  std::ptrdiff_t next = 0;
  View at(int n) const {
    View v = image;
    v.p += n * next;
    return v;
  }
};

inline Tensor blocked_tensor(float* p, int c, int h, int w) {
  const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(h) * w * kUnit;
  return {{p, plane, static_cast<std::ptrdiff_t>(w) * kUnit, kUnit, 1}, plane * units_of(c)};
}

inline Tensor strided_tensor(float* p, std::ptrdiff_t sn, std::ptrdiff_t sc, std::ptrdiff_t sh, std::ptrdiff_t sw) {
  return {{p, sc * kUnit, sh, sw, sc}, sn};
}

}  // namespace mnv4
