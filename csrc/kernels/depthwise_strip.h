// Depthwise k x k over one unit of 16 channels, read where it lies: pixels any distance apart, no borders needed. Two
// vectors of a pixel at a time (V is a pair), so that one instruction loads and one stores both, on x86 a single one;
// strips of T columns from the first row to the last, so that what is at the edge of the image is decided once. V::reg
// holds sums, V::In what is loaded; the sums of 16-bit elements get their factors at the end (V::kScalesAfter), and
// where they have 16 bits themselves they stay short (V::kShortSums).
#pragma once

inline constexpr int kUnknown = -1;  // only known at run time

// T columns of all rows. The first L and the last R input columns of the strip lie outside of the image; where that is
// unknown, columns [lo, hi) exist. Pix: floats between pixels.
template <class V, int K, int S, int T, int Pix, int L, int R>
void depthwise_strip(const BasicDepthwiseArgs<typename V::Elem>& args, int v, int x, int lo, int hi) {
  using reg = typename V::reg;
  using In = typename V::In;
  using E = typename V::Elem;
  constexpr bool edge = L == kUnknown;
  constexpr int N = (T - 1) * S + K, P = K / 2, from = edge ? 0 : L, to = edge ? N : N - R;
  constexpr bool cut = V::kShortSums && K == 5;  // kernel rows are summed apart
  const BasicDepthwiseArgs<E> d = args;          // a copy that no store can change
  const std::ptrdiff_t pix = Pix == kUnknown ? d.src_pix : Pix;
  const E *src = d.src + v + (x * S + from) * pix, *weight = d.weight + v, *row_bias = V::begins(d.bias) + v;
  E* dst = d.dst + v + x * (Pix == kUnknown ? d.dst_pix : kUnit);
  const std::ptrdiff_t* row_off = d.row_off;
  for (int y = 0; y < d.rows; ++y, dst += d.dst_row, row_off += K) {
    reg acc[T];
    // loaded for each pixel: one instruction for both vectors, and no register holds them
    const E* bias = row_bias;
    reg total[cut ? T : 1];
    const auto begin = [&](reg(&r)[T]) MNV4_LAMBDA {
      unroll<T>([&](auto t) MNV4_LAMBDA { r[t] = V::begin(bias = V::hidden(bias)); });
    };
    if constexpr (cut) {
      begin(total);
    } else {
      begin(acc);
    }
    const E* w = V::hidden(weight);
    unroll<K>([&](auto ky) MNV4_LAMBDA {
      if (row_off[ky] >= 0) {
        const E* in = V::hidden(src + row_off[ky]);
        if constexpr (cut && edge) begin(acc);
        In wv[K];
        unroll<K>([&](auto kx) MNV4_LAMBDA { wv[kx] = V::load(w + (ky * K + kx) * kUnit); });
        // input i is tap kx of output (i - kx) / S
        auto use = [&](auto i, In value) MNV4_LAMBDA {
          unroll<K>([&](auto kx) MNV4_LAMBDA {
            constexpr int t = (i - kx) / S;
            if constexpr (i >= kx && (i - kx) % S == 0 && t < T) {
              reg sum;
              if constexpr (cut && !edge && i == (t * S > from ? t * S : from)) {
                sum = V::mul(value, wv[kx]);
              } else {
                sum = V::fma(value, wv[kx], acc[t]);
              }
              if constexpr (V::kTies) in = V::after(in, sum);
              acc[t] = sum;
            }
          });
        };
        auto load = [&](auto i) MNV4_LAMBDA {
          if constexpr (Pix == kUnknown) {
            return V::load_step(in, pix);
          } else {
            return V::load(in + (i - from) * Pix);
          }
        };
        if constexpr (edge) {
          unroll<N>([&](auto i) MNV4_LAMBDA {
            if ((i < P || i >= N - P) && (i < lo || i >= hi)) {
              in += pix;
            } else {
              use(i, load(i));
            }
          });
        } else {
          In value = load(Index<from>{});
          unroll<to - from>([&](auto j) MNV4_LAMBDA {
            // one load ahead of its turn and no more: the others would need registers that there are not
            In next = value;
            if constexpr (j + 1 < to - from) next = load(Index<j + from + 1>{});
            use(Index<j + from>{}, value);
            value = next;
          });
        }
        if constexpr (cut) unroll<T>([&](auto t) MNV4_LAMBDA { total[t] = V::add(total[t], acc[t]); });
      }
    });
    if constexpr (cut) unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = total[t]; });
    if constexpr (V::kScalesAfter) V::finish(acc, d.bias, v);
    if (d.act == Act::relu) {
      unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = V::max(V::zero(), acc[t]); });
    } else if (d.act == Act::relu6) {
      unroll<T>([&](auto t) MNV4_LAMBDA { acc[t] = V::min(V::set(6.0f), V::max(V::zero(), acc[t])); });
    }
    E* out = dst;
    unroll<T>([&](auto t) MNV4_LAMBDA {
      if constexpr (Pix == kUnknown) {
        V::store_step(out, d.dst_pix, acc[t]);
      } else {
        V::store(out + t * kUnit, acc[t]);
      }
    });
  }
}

template <class E>
using StripFn = void (*)(const BasicDepthwiseArgs<E>&, int, int, int, int);

// `left` and `right` input columns of a strip of `cols` output columns lie outside of the image. What symmetric padding
// gives, at an even width with stride 2, has strips of its own.
template <class V, int K, int S, int Pix, int... I>
MNV4_INLINE StripFn<typename V::Elem> pick_strip(int cols, int left, int right, std::integer_sequence<int, I...>) {
  using Fn = StripFn<typename V::Elem>;
  if constexpr (Pix != kUnknown) {
    static constexpr Fn bordered[] = {depthwise_strip<V, K, S, I + 1, Pix, 0, 0>...};
    return bordered[cols - 1];
  } else {
    constexpr int most = sizeof...(I), L = K / 2, R = S == 1 ? L : L - 1;
    static constexpr Fn known[2][2][2] = {
        {{depthwise_strip<V, K, S, most - 1, Pix, 0, 0>, depthwise_strip<V, K, S, most - 1, Pix, 0, R>},
         {depthwise_strip<V, K, S, most - 1, Pix, L, 0>, depthwise_strip<V, K, S, most - 1, Pix, L, R>}},
        {{depthwise_strip<V, K, S, most, Pix, 0, 0>, depthwise_strip<V, K, S, most, Pix, 0, R>},
         {depthwise_strip<V, K, S, most, Pix, L, 0>, depthwise_strip<V, K, S, most, Pix, L, R>}}};
    static constexpr Fn unknown[] = {depthwise_strip<V, K, S, I + 1, Pix, kUnknown, kUnknown>...};
    const bool common = cols >= most - 1 && (left == 0 || left == L) && (right == 0 || right == R);
    return common ? known[cols - most + 1][left != 0][right != 0] : unknown[cols - 1];
  }
}

template <class Cfg, int K, int S, int Pix>
void depthwise_strips(const BasicDepthwiseArgs<typename Cfg::StripVec::Elem>& d) {
  using V = typename Cfg::StripVec;
  constexpr int most = K == 5 ? Cfg::kDwCols5 : Cfg::kDwCols3;
  // strips of one width, the last one over columns of the one before where they do not come out even
  int cols = d.cols, strips = 1;
  if (cols > most) {
    const int a = (d.cols + most - 2) / (most - 1), b = (d.cols + most - 1) / most;
    cols = a * (most - 1) < b * most ? most - 1 : most;
    strips = (d.cols + cols - 1) / cols;
  }
  // few columns a strip: of two widths, where that comes out even
  int wide = strips;  // strips of `cols` columns, the others have one less
  if (V::kShortSums && d.cols > most) {
    strips = (d.cols + most - 1) / most, cols = most, wide = d.cols - strips * (most - 1);
    if (wide < 0) wide = strips;
  }
  for (int i = 0; i < strips; ++i) {
    if (V::kShortSums && i == wide) --cols;
    const int x =
        !V::kShortSums || i < wide ? (i + 1 < strips ? i * cols : d.cols - cols) : d.cols - (strips - i) * cols;
    // with borders all columns exist
    const int lo = d.width > 0 ? d.left - (d.first_col + x) * S : 0, all = (cols - 1) * S + K,
              hi = d.width > 0 ? lo + d.width : all;
    const auto strip = pick_strip<V, K, S, Pix>(cols, lo > 0 ? lo : 0, hi < all ? all - hi : 0,
                                                std::make_integer_sequence<int, most>{});
    for (int v = 0; v < kUnit; v += V::W) strip(d, v, x, lo, hi);
  }
  if (d.act == Act::gelu) {
    for (int y = 0; y < d.rows; ++y) {
      for (int x = 0; x < d.cols; ++x) V::gelu_unit(d.dst + y * d.dst_row + x * d.dst_pix);
    }
  }
}

template <class Cfg, int Pix>
MNV4_INLINE void depthwise_of(const BasicDepthwiseArgs<typename Cfg::StripVec::Elem>& d) {
  if (d.kernel == 3) {
    d.stride == 1 ? depthwise_strips<Cfg, 3, 1, Pix>(d) : depthwise_strips<Cfg, 3, 2, Pix>(d);
  } else {
    d.stride == 1 ? depthwise_strips<Cfg, 5, 1, Pix>(d) : depthwise_strips<Cfg, 5, 2, Pix>(d);
  }
}

// A plane with borders, to one without gaps.
template <class E>
MNV4_INLINE bool bordered(const BasicDepthwiseArgs<E>& d) {
  return d.width == 0 && d.src_pix == kUnit && d.dst_pix == kUnit;
}
