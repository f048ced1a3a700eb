// The product of BFloat16: an instruction adds the products of two pixels' 4 terms with those of two channels to the
// four sums in a vector of fp32.
#pragma once

// `tiles` times MR pixels x NU units, see lane_tiles. Runs are multiples of 8 terms, but for the last one. `epilogue`
// holds factors and what is added, [unit][2][16]. Of an odd number of pixels the last one is its own neighbour.
template <class V, int MR, int NU, bool Packed>
__attribute__((noinline)) void bf16_tiles(const BasicGemmArgs<BFloat16>& g, const BFloat16* b0, const float* epilogue,
                                          const std::ptrdiff_t* a_off, BFloat16* c, const std::ptrdiff_t* c_off,
                                          const BFloat16* res, const std::ptrdiff_t* r_off, int tiles) {
  using reg = typename V::reg;
  using W = typename V::Wide;
  using sum = typename W::reg;
  constexpr int P = (MR + 1) / 2, S = kUnit / 2;  // pairs of pixels, sums of a unit
  const std::ptrdiff_t* k_off = g.k_off;
  const std::ptrdiff_t pix = g.a_pix, blk = g.a_blk;
  int runs = g.k_blocks, len = g.k_len, last = g.k_last;
  std::ptrdiff_t step = kUnit;
  if (len == kUnit && k_off == nullptr) {
    // one run whose units are a_blk apart
    last += (runs - 1) * kUnit, runs = 1, step = blk;
  }
  for (; tiles > 0; --tiles, a_off += MR, c_off += MR, r_off += MR) {
    sum acc[P * NU * S];  // [pair, NU, S], each of 2 pixels x 2 channels
    unroll<P * NU * S>([&](auto i) MNV4_LAMBDA { acc[i] = W::zero(); });
    const BFloat16* b[NU];
    unroll<NU>([&](auto u) MNV4_LAMBDA { b[u] = b0 + u * g.b_unit; });
    const BFloat16* row[MR];  // next term of each pixel; when packed, of pixel 0 only
    // 8 terms; load(m): those of pixel m. Pair by pair, and not before the sums of the terms before are made: there are
    // no registers for more.
    auto oct = [&](auto load) MNV4_LAMBDA {
      reg av[2][P];
      unroll<P>([&](auto p) MNV4_LAMBDA {
        constexpr int one = 2 * p, other = one + 1 < MR ? one + 1 : one;
        if constexpr (V::kTies && p == 0)
          unroll<Packed ? 1 : MR>([&](auto m) MNV4_LAMBDA { row[m] = V::after(row[m], acc); });
        const reg x = load(Index<one>{}), y = load(Index<other>{});
        av[0][p] = V::first_halves(x, y), av[1][p] = V::second_halves(x, y);
        if constexpr (V::kTies) {
          unroll<Packed ? 1 : MR>([&](auto m) MNV4_LAMBDA { row[m] = V::after(row[m], av[0][p], av[1][p]); });
          b[0] = V::after(b[0], av[0][p], av[1][p]);
        }
      });
      unroll<2>([&](auto half) MNV4_LAMBDA {
        unroll<NU>([&](auto u) MNV4_LAMBDA {
          unroll<S / 2>([&](auto j) MNV4_LAMBDA {
            const typename V::Unit w = V::load_unit(b[u]);  // of 4 channels
            unroll<P>([&](auto p) MNV4_LAMBDA {
              unroll<2>([&](auto k) MNV4_LAMBDA {
                constexpr int i = (p * NU + u) * S + 2 * j + k;
                acc[i] = V::mma(av[half][p], w.val[k], acc[i]);
              });
            });
            if constexpr (V::kTies) b[u] = V::after(b[u], acc);
          });
        });
      });
    };
    auto pixel = [&](auto m) MNV4_LAMBDA { return Packed ? row[0] + m * kUnit : row[m]; };
    auto terms = [&](auto at) MNV4_LAMBDA { oct([&](auto m) MNV4_LAMBDA { return V::load(pixel(m) + at); }); };
    auto advance = [&](std::ptrdiff_t n)
                       MNV4_LAMBDA { unroll<Packed ? 1 : MR>([&](auto m) MNV4_LAMBDA { row[m] += n; }); };
    const BFloat16* a = g.a + a_off[0];
    for (int run = 0; run < runs; ++run) {
      row[0] = a + (k_off != nullptr ? k_off[run] : run * blk);
      if constexpr (!Packed) unroll<MR - 1>([&](auto m) MNV4_LAMBDA { row[m + 1] = row[m] + pix; });
      int left = run + 1 == runs ? last : len;
      if (left >= kUnit) {
        do {
          terms(Index<0>{});
          terms(Index<8>{});
          advance(step);
        } while ((left -= kUnit) >= kUnit);
      }
      if (left >= 8) {
        terms(Index<0>{});
        advance(8), left -= 8;
      }
      if (left > 0) {
        // what lies behind them may be anything
        oct([&](auto m) MNV4_LAMBDA { return V::load_some(pixel(m), left); });
      }
    }

    // from here on [pair, NU, pixel, 4 channels at a time]
    unroll<NU>([&](auto u) MNV4_LAMBDA {
      const float* e = epilogue + u * kEpilogue<BFloat16>;
      unroll<P>([&](auto p) MNV4_LAMBDA {
        constexpr int i = (p * NU + u) * S;
        sum y[S];
        unroll<4>([&](auto j) MNV4_LAMBDA {
          const sum factor = W::load(e + 4 * j), shift = W::load(e + kUnit + 4 * j);
          y[j] = W::fma(V::first_halves(acc[i + 2 * j], acc[i + 2 * j + 1]), factor, shift);
          y[4 + j] = W::fma(V::second_halves(acc[i + 2 * j], acc[i + 2 * j + 1]), factor, shift);
        });
        unroll<S>([&](auto j) MNV4_LAMBDA { acc[i + j] = y[j]; });
      });
    });
    if (g.act == Act::relu) {
      unroll<P * NU * S>([&](auto i) MNV4_LAMBDA { acc[i] = relu<W>(acc[i]); });
    } else if (g.act == Act::relu6) {
      unroll<P * NU * S>([&](auto i) MNV4_LAMBDA { acc[i] = relu6<W>(acc[i]); });
    } else if (g.act == Act::gelu) {
      sum t[P * NU * S];
      unroll<P * NU * S>([&](auto i) MNV4_LAMBDA { t[i] = acc[i]; });
      for (sum& v : t) v = V::gelu_of(v);
      unroll<P * NU * S>([&](auto i) MNV4_LAMBDA { acc[i] = t[i]; });
    }
    unroll<MR>([&](auto m) MNV4_LAMBDA {
      BFloat16* q = c + c_off[m];
      unroll<2 * NU>([&](auto j) MNV4_LAMBDA {
        constexpr int u = j / 2, i = (m / 2 * NU + u) * S + m % 2 * 4 + j % 2 * 2;
        sum lo = acc[i], hi = acc[i + 1];
        if (res != nullptr) {
          const reg r = V::load(res + r_off[m] + u * g.r_unit + j % 2 * 8);
          lo = W::add(lo, V::low(r)), hi = W::add(hi, V::high(r));
        }
        V::store(q + u * g.c_unit + j % 2 * 8, V::narrow(lo, hi));
      });
    });
  }
}

using Bf16Fn = void (*)(const BasicGemmArgs<BFloat16>&, const BFloat16*, const float*, const std::ptrdiff_t*, BFloat16*,
                        const std::ptrdiff_t*, const BFloat16*, const std::ptrdiff_t*, int);

template <class V, int NU, bool Packed, int... M>
MNV4_INLINE Bf16Fn pick_bf16(int mr, std::integer_sequence<int, M...>) {
  static constexpr Bf16Fn table[] = {bf16_tiles<V, M + 1, NU, Packed>...};
  return table[mr - 1];
}

// `n` tiles of mr pixels and nu units
template <class Cfg, bool Packed>
void run_tiles(const BasicGemmArgs<BFloat16>& g, int mr, int nu, const BFloat16* b, const float* epilogue,
               const std::ptrdiff_t* a_off, BFloat16* c, const std::ptrdiff_t* c_off, const BFloat16* res,
               const std::ptrdiff_t* r_off, int n) {
  using V = typename Cfg::V;
  const Bf16Fn fn = nu == 1
                        ? pick_bf16<V, 1, Packed>(mr, std::make_integer_sequence<int, Cfg::kTallRows>{})
                        : pick_bf16<V, Cfg::kWideUnits, Packed>(mr, std::make_integer_sequence<int, Cfg::kWideRows>{});
  fn(g, b, epilogue, a_off, c, c_off, res, r_off, n);
}
