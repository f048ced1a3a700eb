// Depthwise k x k over one unit of 16 channels, read where it lies: pixels any distance apart, no borders needed. Two
// vectors of a pixel at a time (V is a pair), so that one instruction loads and one stores both.
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
  template <int I>
  MNV4_INLINE typename V::reg at() const {
    if constexpr (kHeld) return held[I];
    return V::load(w + I * kUnit);
  }
};

// Input columns [lo, hi) exist, counted from the first one of the tile. Edge: not all of those that it reads do.
// Pix: floats between pixels, 0: only known at run time.
template <class V, int K, int S, int T, int Pix, bool Edge>
MNV4_INLINE void depthwise_tile(const DepthwiseArgs& d, const float* src, const std::ptrdiff_t* row_off,
                                const Taps<V, K>& taps, const float* bias, float* dst, int lo, int hi) {
  using reg = typename V::reg;
  constexpr int N = (T - 1) * S + K, P = K / 2;
  const std::ptrdiff_t pix = Pix > 0 ? Pix : d.src_pix;
  reg acc[T];
  // loaded for each pixel: one instruction for both vectors, and no register holds them
  unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = V::load(bias = V::hidden(bias)); });
  unroll<K>([&](auto ky) MNV4_LAMBDA {
    if (row_off[ky] >= 0) {
      const float* in = V::hidden(src + row_off[ky]);
      reg wv[K];
      unroll<K>([&](auto kx) MNV4_LAMBDA { wv[kx] = taps.template at<ky * K + kx>(); });
      unroll<N>([&](auto i) MNV4_LAMBDA {
        auto use = [&](reg v) MNV4_LAMBDA {
          unroll<K>([&](auto kx) MNV4_LAMBDA {
            // input i is tap kx of output (i - kx) / S
            if constexpr (i >= kx && (i - kx) % S == 0 && (i - kx) / S < T) {
              acc[(i - kx) / S] = V::fma(v, wv[kx], acc[(i - kx) / S]);
            }
          });
        };
        if (Edge && (i < P || i >= N - P) && (i < lo || i >= hi)) {
          if constexpr (Pix == 0) in += pix;
        } else if constexpr (Pix == 0) {
          use(V::load_step(in, pix));
        } else {
          use(V::load(in + i * Pix));
        }
      });
    }
  });
  if (d.act == Act::relu) {
    unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = V::max(V::zero(), acc[t]); });
  } else if (d.act == Act::relu6) {
    unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = V::min(V::set(6.0f), V::max(V::zero(), acc[t])); });
  }
  unroll<T>([&](auto t) MNV4_LAMBDA {
    if constexpr (Pix > 0) {
      V::store(dst + t * kUnit, acc[t]);
    } else {
      V::store(dst, acc[t]);
      dst += d.dst_pix;
    }
  });
}

template <class V, int K, int S, int T, int Pix>
MNV4_INLINE void depthwise_at(const DepthwiseArgs& d, const float* src, const std::ptrdiff_t* row_off,
                              const Taps<V, K>& taps, const float* bias, float* dst, int x) {
  const int lo = d.left - (d.first_col + x) * S, hi = lo + d.width;
  if (d.width > 0 && (lo > 0 || hi < (T - 1) * S + K)) {
    depthwise_tile<V, K, S, T, Pix, true>(d, src, row_off, taps, bias, dst, lo, hi);
  } else {
    depthwise_tile<V, K, S, T, Pix, false>(d, src, row_off, taps, bias, dst, lo, hi);
  }
}

// `wide` tiles of T pixels, then `narrow` tiles of T - 1, in each row
template <class V, int K, int S, int T, int Pix>
void depthwise_rows(const DepthwiseArgs& args, int wide, int narrow) {
  const DepthwiseArgs d = args;  // a copy that no store can change
  for (int v = 0; v < kUnit; v += V::W) {
    const Taps<V, K> taps(d.weight + v);
    for (int y = 0; y < d.rows; ++y) {
      const std::ptrdiff_t* off = d.row_off + y * K;
      const float* in = d.src + v;
      float* out = d.dst + y * d.dst_row + v;
      int x = 0;
      for (int t = 0; t < wide; ++t, x += T, in += T * S * d.src_pix, out += T * d.dst_pix)
        depthwise_at<V, K, S, T, Pix>(d, in, off, taps, d.bias + v, out, x);
      if constexpr (T > 1) {
        for (int t = 0; t < narrow; ++t, x += T - 1, in += (T - 1) * S * d.src_pix, out += (T - 1) * d.dst_pix)
          depthwise_at<V, K, S, T - 1, Pix>(d, in, off, taps, d.bias + v, out, x);
      }
    }
  }
  if (d.act == Act::gelu) {
    for (int y = 0; y < d.rows; ++y) {
      for (int x = 0; x < d.cols; ++x) gelu_inplace<typename V::Half>(d.dst + y * d.dst_row + x * d.dst_pix, kUnit);
    }
  }
}

template <class V, int K, int S, int Pix, int... I>
MNV4_INLINE void depthwise_pick(const DepthwiseArgs& d, std::integer_sequence<int, I...>) {
  constexpr int max_cols = sizeof...(I);
  using Fn = void (*)(const DepthwiseArgs&, int, int);
  static constexpr Fn table[] = {depthwise_rows<V, K, S, I + 1, Pix>...};
  const int tiles = (d.cols + max_cols - 1) / max_cols;
  const int cols = (d.cols + tiles - 1) / tiles;
  const int narrow = cols * tiles - d.cols;
  table[cols - 1](d, tiles - narrow, narrow);
}

template <class Cfg, int Pix>
MNV4_INLINE void depthwise_of(const DepthwiseArgs& d) {
  using V = typename Cfg::Pair;
  constexpr auto three = std::make_integer_sequence<int, Cfg::kDwCols3>{};
  constexpr auto five = std::make_integer_sequence<int, Cfg::kDwCols5>{};
  if (d.kernel == 3) {
    d.stride == 1 ? depthwise_pick<V, 3, 1, Pix>(d, three) : depthwise_pick<V, 3, 2, Pix>(d, three);
  } else {
    d.stride == 1 ? depthwise_pick<V, 5, 1, Pix>(d, five) : depthwise_pick<V, 5, 2, Pix>(d, five);
  }
}

template <class Cfg>
void depthwise(const DepthwiseArgs& d) {
  d.src_pix == kUnit&& d.dst_pix == kUnit ? depthwise_of<Cfg, kUnit>(d) : depthwise_of<Cfg, 0>(d);
}
