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

}  // namespace mnv4
