// Plain data shared by the planner, the executor and the kernels.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace mnv4 {

// Channels of one unit: activations are blocked [channels / 16][rows][columns][16] in every tier.
inline constexpr int kUnit = 16;

enum class Act : std::int32_t { none = 0, relu = 1, relu6 = 2, gelu = 3 };

inline constexpr int units_of(int channels) { return (channels + kUnit - 1) / kUnit; }

/// Floats rounded up to whole cache lines.
inline constexpr std::size_t round_line(std::size_t floats) { return (floats + 15) / 16 * 16; }

/// The upper half of a float.
struct BFloat16 {
  std::uint16_t bits;
  BFloat16() = default;
  /// Rounds to nearest, ties to even; NaN stays one.
  BFloat16(float x) {
    const std::uint32_t b = std::bit_cast<std::uint32_t>(x);
    bits = static_cast<std::uint16_t>(x != x ? b >> 16 | 0x40 : (b + 0x7fff + (b >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }
};

// X(T) for the elements that blocks, heads and programs exist for, which are templates over them.
#if defined(MNV4_OPS_HAVE_NEON_FP16) && defined(MNV4_OPS_HAVE_NEON_BF16)
#define MNV4_OPS_HALF 1
using Half = __fp16;
#define MNV4_OPS_EACH_HALF(X) X(Half) X(BFloat16)
#else
#define MNV4_OPS_EACH_HALF(X)
#endif
#define MNV4_OPS_EACH_ELEMENT(X) X(float) MNV4_OPS_EACH_HALF(X)

// Floats of what follows a product or a depthwise convolution, for each unit: [16] to add; of BFloat16 a factor as
// well, [2][16]; of Half [4][16] elements: the factor in two parts and what is added, see pack_epilogue.
template <class T>
inline constexpr int kEpilogue = sizeof(T) == sizeof(float) ? kUnit : 2 * kUnit;

/// Terms of a packed product of `terms`, which go in steps: of BFloat16 8, of Half the 16 that a part of a sum has.
/// What is beyond is 0.
template <class T>
constexpr std::ptrdiff_t packed_terms(std::ptrdiff_t terms) {
  constexpr std::ptrdiff_t step = std::is_same_v<T, BFloat16> ? 8 : sizeof(T) == sizeof(float) ? 1 : kUnit;
  return (terms + step - 1) / step * step;
}

// Address of element (c, y, x): p + (c / 16) * unit + (c % 16) * chan + y * row + x * pix. Strides in elements.
template <class T>
struct BasicView {
  T* p = nullptr;
  std::ptrdiff_t unit = 0, row = 0, pix = 0, chan = 1;
};

// The views of one image of a batch and the distance to the next image.
template <class T>
struct BasicTensor {
  BasicView<T> image;
  std::ptrdiff_t next = 0;
  BasicView<T> at(int n) const {
    BasicView<T> v = image;
    v.p += n * next;
    return v;
  }
};

using View = BasicView<float>;
using Tensor = BasicTensor<float>;

template <class T>
BasicTensor<T> blocked_tensor(T* p, int c, int h, int w) {
  const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(h) * w * kUnit;
  return {{p, plane, static_cast<std::ptrdiff_t>(w) * kUnit, kUnit, 1}, plane * units_of(c)};
}

template <class T>
BasicTensor<T> strided_tensor(T* p, std::ptrdiff_t sn, std::ptrdiff_t sc, std::ptrdiff_t sh, std::ptrdiff_t sw) {
  return {{p, sc * kUnit, sh, sw, sc}, sn};
}

}  // namespace mnv4
