#include <algorithm>
#include <cmath>
#include <cstring>

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

// `taps` outermost in the packed order, `c_in` in the order of the weight; one input channel: depthwise
void pack_half(const StageParams& p, int c_out, int c_in, int taps, Half* weight, float* epilogue) {
  const std::size_t k_total = static_cast<std::size_t>(c_in) * taps;
  for (int o = 0; o < units_of(c_out) * kUnit; ++o) {
    const int u = o / kUnit, i = o % kUnit;
    Half* w = weight + u * k_total * kUnit + i;
    Half* e = reinterpret_cast<Half*>(epilogue + u * kEpilogue<Half>) + i;
    if (o >= c_out) {
      for (std::size_t k = 0; k < k_total; ++k) w[k * kUnit] = static_cast<Half>(0.0f);
      for (int j = 0; j < 4; ++j) e[j * kUnit] = static_cast<Half>(0.0f);
      continue;
    }
    const double power = pack_epilogue(affine(p, o), c_in == 1, e);
    const float* src = p.weight + o * k_total;
    for (int t = 0; t < taps; ++t) {
      for (int c = 0; c < c_in; ++c) {
        w[(static_cast<std::size_t>(t) * c_in + c) * kUnit] =
            static_cast<Half>(static_cast<float>(src[static_cast<std::size_t>(c) * taps + t] * power));
      }
    }
  }
}

}  // namespace

void pack_gemm(const StageParams& p, int c_out, int c_in, int kernel, Half* weight, float* epilogue) {
  pack_half(p, c_out, c_in, kernel * kernel, weight, epilogue);
}

void pack_depthwise(const StageParams& p, int channels, int kernel, Half* weight, float* epilogue) {
  pack_half(p, channels, 1, kernel * kernel, weight, epilogue);
}
#endif

}  // namespace mnv4
