// Depthwise k x k over one unit of 16 channels: a row of T output pixels at a time, inputs loaded once per kernel row.
#pragma once

template <class V, int K, int S, int T>
MNV4_INLINE void depthwise_tile(const float* src, const std::ptrdiff_t* row_off, const float* w, const float* bias, float* dst, Act act) {
  using reg = typename V::reg;
  reg acc[T];
  const reg bv = V::load(bias);
  unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = bv; });
  for (int ky = 0; ky < K; ++ky) {
    if (row_off[ky] < 0) continue;
    const float* in = src + row_off[ky];
    const float* wr = w + ky * K * kUnit;
    reg wv[K];
    unroll<K>([&](auto kx) MNV4_LAMBDA { wv[kx] = V::load(wr + kx * kUnit); });
    unroll<(T - 1) * S + K>([&](auto i) MNV4_LAMBDA {
      const reg v = V::load(in + i * kUnit);
      unroll<K>([&](auto kx) MNV4_LAMBDA {
        // input i is tap kx of output t = (i - kx) / S
        if constexpr ((i - kx) % S == 0 && (i - kx) / S >= 0 && (i - kx) / S < T && i - kx >= 0) {
          acc[(i - kx) / S] = V::fma(v, wv[kx], acc[(i - kx) / S]);
        }
      });
    });
  }
  if (act == Act::relu) {
    unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = relu<V>(acc[t]); });
  } else if (act == Act::relu6) {
    unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = relu6<V>(acc[t]); });
  }
  unroll<T>([&](auto t) MNV4_LAMBDA { V::store(dst + t * kUnit, acc[t]); });
}

template <class V, int K, int S, int MaxT>
void depthwise_rows(const DepthwiseArgs& d) {
  const int tiles = (d.cols + MaxT - 1) / MaxT;
  for (int y = 0; y < d.rows; ++y) {
    const std::ptrdiff_t* off = d.row_off + y * K;
    for (int v = 0; v < kUnit; v += V::W) {
      const float* src = d.src + v;
      float* dst = d.dst + y * d.dst_row + v;
      const float* w = d.weight + v;
      const float* bias = d.bias + v;
      for (int t = 0, x = 0; t < tiles; ++t) {
        const int n = (d.cols - x + (tiles - t) - 1) / (tiles - t);
        const float* in = src + static_cast<std::ptrdiff_t>(x) * S * kUnit;
        float* out = dst + static_cast<std::ptrdiff_t>(x) * kUnit;
        [&]<int... I>(std::integer_sequence<int, I...>) MNV4_LAMBDA {
          ((n == I + 1 ? depthwise_tile<V, K, S, I + 1>(in, off, w, bias, out, d.act) : void()), ...);
        }(std::make_integer_sequence<int, MaxT>{});
        x += n;
      }
    }
    if (d.act == Act::gelu) gelu_inplace<V>(d.dst + y * d.dst_row, d.cols * kUnit);
  }
}

template <class Cfg>
void depthwise(const DepthwiseArgs& d) {
  using V = typename Cfg::V;
  if (d.kernel == 3) {
    d.stride == 1 ? depthwise_rows<V, 3, 1, Cfg::kDwCols>(d) : depthwise_rows<V, 3, 2, Cfg::kDwCols>(d);
  } else {
    d.stride == 1 ? depthwise_rows<V, 5, 1, Cfg::kDwCols>(d) : depthwise_rows<V, 5, 2, Cfg::kDwCols>(d);
  }
}
