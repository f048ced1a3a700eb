// Depthwise k x k over one unit of 16 channels: T output pixels of a row at a time, each input loaded once per kernel
// row.
#pragma once

template <class V, int K>
struct Taps {
  // 3 x 3 taps stay in registers for all rows; 5 x 5 are loaded a kernel row at a time
  static constexpr bool kHeld = K == 3;
  typename V::reg held[kHeld ? K * K : 1];
  const float* w;
  MNV4_INLINE explicit Taps(const float* p) : w(p) {
    if constexpr (kHeld) unroll<K * K>([&](auto i) MNV4_LAMBDA { held[i] = V::load(p + i * kUnit); });
  }
  template <int KY>
  MNV4_INLINE void row(typename V::reg* out) const {
    unroll<K>([&](auto kx) MNV4_LAMBDA {
      if constexpr (kHeld) {
        out[kx] = held[KY * K + kx];
      } else {
        out[kx] = V::load(w + (KY * K + kx) * kUnit);
      }
    });
  }
};

template <class V, int K, int S, int T>
MNV4_INLINE void depthwise_tile(const float* src, const std::ptrdiff_t* row_off, const Taps<V, K>& taps,
                                typename V::reg bias, float* dst, Act act) {
  using reg = typename V::reg;
  reg acc[T];
  unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = bias; });
  unroll<K>([&](auto ky) MNV4_LAMBDA {
    if (row_off[ky] >= 0) {
      const float* in = src + row_off[ky];
      reg wv[K];
      taps.template row<ky>(wv);
      unroll<(T - 1) * S + K>([&](auto i) MNV4_LAMBDA {
        const reg v = V::load(in + i * kUnit);
        unroll<K>([&](auto kx) MNV4_LAMBDA {
          // input i is tap kx of output (i - kx) / S
          if constexpr (i >= kx && (i - kx) % S == 0 && (i - kx) / S < T) {
            acc[(i - kx) / S] = V::fma(v, wv[kx], acc[(i - kx) / S]);
          }
        });
      });
    }
  });
  if (act == Act::relu) {
    unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = relu<V>(acc[t]); });
  } else if (act == Act::relu6) {
    unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = relu6<V>(acc[t]); });
  }
  unroll<T>([&](auto t) MNV4_LAMBDA { V::store(dst + t * kUnit, acc[t]); });
}

// `wide` tiles of T pixels, then `narrow` tiles of T - 1, in each row
template <class V, int K, int S, int T>
void depthwise_rows(const DepthwiseArgs& d, int wide, int narrow) {
  for (int v = 0; v < kUnit; v += V::W) {
    const Taps<V, K> taps(d.weight + v);
    const typename V::reg bias = V::load(d.bias + v);
    for (int y = 0; y < d.rows; ++y) {
      const std::ptrdiff_t* off = d.row_off + y * K;
      const float* in = d.src + v;
      float* out = d.dst + y * d.dst_row + v;
      for (int t = 0; t < wide; ++t, in += T * S * kUnit, out += T * kUnit)
        depthwise_tile<V, K, S, T>(in, off, taps, bias, out, d.act);
      if constexpr (T > 1) {
        for (int t = 0; t < narrow; ++t, in += (T - 1) * S * kUnit, out += (T - 1) * kUnit) {
          depthwise_tile<V, K, S, T - 1>(in, off, taps, bias, out, d.act);
        }
      }
    }
  }
  if (d.act == Act::gelu) {
    for (int y = 0; y < d.rows; ++y) gelu_inplace<V>(d.dst + y * d.dst_row, d.cols * kUnit);
  }
}

template <class V, int K, int S, int... I>
MNV4_INLINE void depthwise_pick(const DepthwiseArgs& d, std::integer_sequence<int, I...>) {
  constexpr int max_cols = sizeof...(I);
  using Fn = void (*)(const DepthwiseArgs&, int, int);
  static constexpr Fn table[] = {depthwise_rows<V, K, S, I + 1>...};
  const int tiles = (d.cols + max_cols - 1) / max_cols;
  const int cols = (d.cols + tiles - 1) / tiles;
  const int narrow = cols * tiles - d.cols;
  table[cols - 1](d, tiles - narrow, narrow);
}

template <class Cfg>
void depthwise(const DepthwiseArgs& d) {
  using V = typename Cfg::V;
  constexpr auto cols = std::make_integer_sequence<int, Cfg::kDwCols>{};
  if (d.kernel == 3) {
    d.stride == 1 ? depthwise_pick<V, 3, 1>(d, cols) : depthwise_pick<V, 3, 2>(d, cols);
  } else {
    d.stride == 1 ? depthwise_pick<V, 5, 1>(d, cols) : depthwise_pick<V, 5, 2>(d, cols);
  }
}
