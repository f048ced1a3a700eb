#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/block.h"

namespace mnv4 {

Affine affine(const StageParams& p, int o) {
  double scale = 1.0, shift = p.bias != nullptr ? p.bias[o] : 0.0;
  if (p.bn_mean != nullptr && p.bn_var != nullptr) {
    scale = (p.bn_weight != nullptr ? static_cast<double>(p.bn_weight[o]) : 1.0) /
            std::sqrt(static_cast<double>(p.bn_var[o]) + p.eps);
    shift = (shift - p.bn_mean[o]) * scale + (p.bn_bias != nullptr ? p.bn_bias[o] : 0.0);
  }
  if (p.gamma != nullptr) {
    scale *= p.gamma[o];
    shift *= p.gamma[o];
  }
  return {scale, shift};
}

void pack_gemm(const StageParams& p, int c_out, int c_in, int kernel, float* weight, float* bias) {
  const int taps = kernel * kernel;
  const std::size_t k_total = static_cast<std::size_t>(c_in) * taps;
  for (int u = 0; u < units_of(c_out); ++u) {
    for (int i = 0; i < kUnit; ++i) {
      const int o = u * kUnit + i;
      float* w = weight + u * k_total * kUnit + i;
      if (o >= c_out) {
        for (std::size_t k = 0; k < k_total; ++k) w[k * kUnit] = 0.0f;
        bias[o] = 0.0f;
        continue;
      }
      const Affine a = affine(p, o);
      bias[o] = static_cast<float>(a.shift);
      const float* src = p.weight + o * k_total;
      for (int t = 0; t < taps; ++t) {
        for (int c = 0; c < c_in; ++c) {
          w[(static_cast<std::size_t>(t) * c_in + c) * kUnit] =
              static_cast<float>(src[static_cast<std::size_t>(c) * taps + t] * a.scale);
        }
      }
    }
  }
}

void pack_depthwise(const StageParams& p, int channels, int kernel, float* weight, float* bias) {
  const int taps = kernel * kernel;
  for (int o = 0; o < units_of(channels) * kUnit; ++o) {
    float* w = weight + static_cast<std::size_t>(o / kUnit) * taps * kUnit + o % kUnit;
    const bool real = o < channels;
    const Affine a = real ? affine(p, o) : Affine{0.0, 0.0};
    bias[o] = static_cast<float>(a.shift);
    for (int t = 0; t < taps; ++t) w[t * kUnit] = real ? static_cast<float>(p.weight[o * taps + t] * a.scale) : 0.0f;
  }
}

#if defined(MNV4_OPS_HALF)
namespace {

// Factors [4][16] of one channel of a unit: scale in two parts; shift; 0. `signs`: the second part of the scale is
// never 0 nor of another sign than the first, so that infinities keep theirs. Returns the power of two that the weights
// take from the scale: a factor far from 1 would be coarse, or none at all.
double pack_epilogue(const Affine& a, bool signs, Half* p) {
  int exponent = 0;
  double scale = a.scale;
  if (scale != 0.0 && std::isfinite(scale)) {
    std::frexp(scale, &exponent);
    exponent = exponent > 8 ? exponent - 8 : exponent < -6 ? exponent + 6 : 0;
    scale = std::ldexp(scale, -exponent);
  }
  Half high = static_cast<Half>(static_cast<float>(scale));
  float rest = static_cast<float>(scale - static_cast<double>(static_cast<float>(high)));
  if (signs && std::isfinite(scale) && scale != 0.0) {
    // towards zero: the next one down has the bits before
    if ((rest < 0.0f) != (scale < 0.0) && rest != 0.0f) {
      std::uint16_t bits;
      std::memcpy(&bits, &high, sizeof bits);
      --bits;
      std::memcpy(&high, &bits, sizeof bits);
      rest = static_cast<float>(scale - static_cast<double>(static_cast<float>(high)));
    }
    if (std::fabs(rest) < 0x1p-24f) rest = std::copysign(0x1p-24f, static_cast<float>(scale));
  }
  p[0] = high;
  p[kUnit] = static_cast<Half>(rest);
  p[2 * kUnit] = static_cast<Half>(static_cast<float>(a.shift));
  p[3 * kUnit] = static_cast<Half>(0.0f);
  return std::ldexp(1.0, exponent);
}

// Returns what the weights are multiplied by: 1, since all of the scale comes after the sum.
double pack_epilogue(const Affine& a, bool, float* p) {
  p[0] = static_cast<float>(a.scale);
  p[kUnit] = static_cast<float>(a.shift);
  return 1.0;
}

// What an epilogue consists of.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, Half>, Half, float>;

// `taps` outermost in the packed order, `c_in` in the order of the weight. at(k, i): where term k of channel i of a
// unit goes, of `terms` a unit.
template <class T, class At>
void pack_unfolded(const StageParams& p, int c_out, int c_in, int taps, std::ptrdiff_t terms, At at, T* weight,
                   float* epilogue) {
  using F = Factor<T>;
  for (int o = 0; o < units_of(c_out) * kUnit; ++o) {
    const int u = o / kUnit, i = o % kUnit;
    T* w = weight + u * terms * kUnit;
    F* e = reinterpret_cast<F*>(epilogue + u * kEpilogue<T>) + i;
    for (std::ptrdiff_t k = 0; k < terms; ++k) w[at(k, i)] = static_cast<T>(0.0f);
    if (o >= c_out) {
      for (std::size_t j = 0; j < kEpilogue<T> * sizeof(float) / sizeof(F); j += kUnit) e[j] = static_cast<F>(0.0f);
      continue;
    }
    const double power = pack_epilogue(affine(p, o), c_in == 1, e);
    const float* src = p.weight + static_cast<std::ptrdiff_t>(o) * c_in * taps;
    for (int t = 0; t < taps; ++t) {
      for (int c = 0; c < c_in; ++c) {
        w[at(static_cast<std::ptrdiff_t>(t) * c_in + c, i)] =
            static_cast<T>(static_cast<float>(src[static_cast<std::ptrdiff_t>(c) * taps + t] * power));
      }
    }
  }
}

std::ptrdiff_t by_terms(std::ptrdiff_t k, int i) { return k * kUnit + i; }
std::ptrdiff_t by_fours(std::ptrdiff_t k, int i) { return k / 4 * 4 * kUnit + i * 4 + k % 4; }

}  // namespace

#define MNV4_OPS_FOR(T)                                                                               \
  void pack_gemm(const StageParams& p, int c_out, int c_in, int kernel, T* weight, float* epilogue) { \
    const int taps = kernel * kernel;                                                                 \
    pack_unfolded(p, c_out, c_in, taps, packed_terms<T>(static_cast<std::ptrdiff_t>(c_in) * taps),    \
                  std::is_same_v<T, BFloat16> ? by_fours : by_terms, weight, epilogue);               \
  }                                                                                                   \
  void pack_depthwise(const StageParams& p, int channels, int kernel, T* weight, float* epilogue) {   \
    const int taps = kernel * kernel;                                                                 \
    pack_unfolded(p, channels, 1, taps, taps, by_terms, weight, epilogue);                            \
  }
MNV4_OPS_EACH_HALF(MNV4_OPS_FOR)
#endif

}  // namespace mnv4
