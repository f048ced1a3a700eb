// The product in fp16 arithmetic: 8 lanes a vector. Sums of 16 bits stay short: two chains of 8 terms each, the even
// and the odd ones of 16, are added, and what a running sum of such parts loses when it grows is kept and goes into the
// next part (Kahan), so that the running sum is as good as one in fp32. `fine`: chains of 4 terms, for products whose
// result torch rounds only once.
#pragma once

// V::reg holds 8 elements; `from` + `lo` is the sum, afterwards `to` + `lo`. That it moves to another array saves
// copies.
template <class V, int N>
MNV4_INLINE void carry(typename V::reg (&from)[N], typename V::reg (&lo)[N], typename V::reg (&to)[N]) {
  unroll<N>([&](auto i) MNV4_LAMBDA {
    to[i] = V::add(from[i], lo[i]);
    from[i] = V::sub(from[i], to[i]);
    lo[i] = V::add(lo[i], from[i]);
  });
}

template <class V, int N>
MNV4_INLINE void carry(typename V::reg (&hi)[N], typename V::reg (&lo)[N]) {
  typename V::reg sum[N];
  carry<V>(hi, lo, sum);
  unroll<N>([&](auto i) MNV4_LAMBDA { hi[i] = sum[i]; });
}

// `tiles` times MR pixels x NU units, see lane_tiles. `after` holds factors and what is added, [unit][4][16]. False if
// a result is not finite: then all have to be computed in another way.
template <class V, int MR, int NU, bool Packed, bool Fine>
__attribute__((noinline)) bool half_tiles(const BasicGemmArgs<Half>& g, const Half* b0, const Half* after,
                                          const std::ptrdiff_t* a_off, Half* c, const std::ptrdiff_t* c_off,
                                          const Half* res, const std::ptrdiff_t* r_off, int tiles) {
  using reg = typename V::reg;
  constexpr int S = kUnit / V::W, N = MR * NU * S;
  const std::ptrdiff_t* k_off = g.k_off;
  const std::ptrdiff_t pix = g.a_pix, blk = g.a_blk;
  int runs = g.k_blocks, len = g.k_len, last = g.k_last;
  std::ptrdiff_t step = kUnit;
  if (len == kUnit && k_off == nullptr) {
    // one run whose units are a_blk apart
    last += (runs - 1) * kUnit, runs = 1, step = blk;
  }
  reg finite[2] = {V::zero(), V::zero()};  // turn NaN with the first result that is not
  for (; tiles > 0; --tiles, a_off += MR, c_off += MR, r_off += MR) {
    reg hi[N], lo[N];  // [MR, NU, S]: the sum, and what is to be added to it
    const Half* b[NU];
    unroll<NU>([&](auto u) MNV4_LAMBDA { b[u] = b0 + u * g.b_unit; });
    const Half* row[MR];  // next term of each pixel; when packed, of pixel 0 only
    auto term = [&](reg(&acc)[N], auto fma) MNV4_LAMBDA {
      unroll<NU>([&](auto u) MNV4_LAMBDA {
        const typename V::Unit w = V::load_unit(b[u]);
        unroll<MR>([&](auto m) MNV4_LAMBDA {
          unroll<S>([&](auto j) MNV4_LAMBDA {
            constexpr int i = (m * NU + u) * S + j;
            acc[i] = fma(w.val[j], acc[i], m);
          });
        });
        if constexpr (V::kTies) b[u] = V::after(b[u], acc);
      });
    };
    // 8 terms, `at` elements on: the even ones to one chain, the odd ones to the other. `fresh`: which of the two begin
    // here, so that their first product is not added to anything
    auto oct = [&](reg(&even)[N], reg(&odd)[N], auto at, auto fresh) MNV4_LAMBDA {
      reg av[MR];
      unroll<MR>([&](auto m) MNV4_LAMBDA { av[m] = V::load(Packed ? row[0] + m * kUnit + at : row[m] + at); });
      unroll<V::W>([&](auto i) MNV4_LAMBDA {
        auto fma = [&](reg w, reg sum, auto m) MNV4_LAMBDA {
          if constexpr (i < 2 && (fresh >> i) % 2 == 1) return V::template mul_lane<i>(w, av[m]);
          return V::template fma_lane<i>(w, av[m], sum);
        };
        if constexpr (i % 2 == 0) {
          term(even, fma);
        } else {
          term(odd, fma);
        }
        if constexpr (Fine && i % 4 == 3) carry<V>(hi, lo);
      });
    };
    auto advance = [&](std::ptrdiff_t n)
                       MNV4_LAMBDA { unroll<Packed ? 1 : MR>([&](auto m) MNV4_LAMBDA { row[m] += n; }); };
    auto start = [&](const Half* p) MNV4_LAMBDA {
      row[0] = p;
      if constexpr (!Packed) unroll<MR - 1>([&](auto m) MNV4_LAMBDA { row[m + 1] = row[m] + pix; });
    };
    constexpr Index<0> none;
    constexpr Index<2> odd_one;
    constexpr Index<3> both;
    const Half* a = g.a + a_off[0];
    int run = 0, left = runs > 1 ? len : last;
    start(k_off != nullptr ? a + k_off[0] : a);
    auto next_run = [&]() MNV4_LAMBDA {
      start(a + (k_off != nullptr ? k_off[run] : run * blk));
      left = run + 1 == runs ? last : len;
    };
    auto join = [&](reg(&sum)[N], reg(&part)[N])
                    MNV4_LAMBDA { unroll<N>([&](auto i) MNV4_LAMBDA { sum[i] = V::add(lo[i], part[i]); }); };
    reg more[N];
    if (!Fine && last % kUnit == 0 && (runs == 1 || len % kUnit == 0)) {
      // parts of 16 terms; the first one is the sum, the second one what is to be added
      auto part = [&](reg(&odd)[N], auto fresh) MNV4_LAMBDA {
        oct(lo, odd, none, fresh);
        oct(lo, odd, Index<8>{}, none);
        advance(step), left -= kUnit;
      };
      // carries, and adds a part
      auto turn = [&](reg(&from)[N], reg(&to)[N]) MNV4_LAMBDA {
        carry<V>(from, lo, to);
        // the pixels' terms are not loaded before all this
        if constexpr (V::kTies) row[0] = V::after(row[0], lo);
        part(from, odd_one);
        join(lo, from);
      };
      auto end_of_run = [&]() MNV4_LAMBDA {
        if (left == 0 && ++run < runs) next_run();
      };
      part(more, both);
      join(hi, more);
      end_of_run();
      if (run == runs) {
        unroll<N>([&](auto i) MNV4_LAMBDA { lo[i] = V::zero(); });
      } else {
        part(more, both);
        join(lo, more);
        end_of_run();
        while (run < runs) {
          do {
            turn(hi, more);
            if (left == 0) {
              unroll<N>([&](auto i) MNV4_LAMBDA { hi[i] = more[i]; });
              break;
            }
            turn(more, hi);
          } while (left > 0);
          end_of_run();
        }
      }
    } else {
      // parts of 16 terms, or of 17 or 18 where a run ends there
      unroll<N>([&](auto i) MNV4_LAMBDA { hi[i] = lo[i] = V::zero(); });
      unroll<N>([&](auto i) MNV4_LAMBDA { more[i] = V::zero(); });
      int terms = 0;
      bool first = true;
      auto flush = [&](int coming) MNV4_LAMBDA {
        if (Fine || terms + coming <= 18) return;
        if (first) {
          join(hi, more);
          unroll<N>([&](auto i) MNV4_LAMBDA { lo[i] = V::zero(); });
        } else {
          join(lo, more);
          carry<V>(hi, lo);
        }
        unroll<N>([&](auto i) MNV4_LAMBDA { more[i] = V::zero(); });
        terms = 0, first = false;
      };
      for (;;) {
        for (int at = 0; left >= V::W; left -= V::W, terms += V::W) {
          flush(V::W);
          if constexpr (Fine) {
            oct(lo, lo, none, none);
          } else {
            oct(lo, more, none, none);
          }
          at += V::W;
          advance(at % kUnit == 0 ? step - V::W : V::W);
        }
        for (; left > 0; --left, ++terms) {
          flush(1);
          term(lo, [&](reg w, reg sum, auto m)
                       MNV4_LAMBDA { return V::fma(V::set(Packed ? row[0][m * kUnit] : row[m][0]), w, sum); });
          advance(1);
          if constexpr (Fine) {
            if (left % 4 == 1) carry<V>(hi, lo);
          }
        }
        if (++run >= runs) break;
        next_run();
      }
      if (!Fine && first) {
        join(hi, more);
        unroll<N>([&](auto i) MNV4_LAMBDA { lo[i] = V::zero(); });
      } else if (!Fine) {
        join(lo, more);
      }
    }

    unroll<NU>([&](auto u) MNV4_LAMBDA {
      const Half* p = after + u * 4 * kUnit;
      const typename V::Unit factor = V::load_unit(p), rest = V::load_unit(p), shift = V::load_unit(p);
      unroll<MR>([&](auto m) MNV4_LAMBDA {
        unroll<S>([&](auto j) MNV4_LAMBDA {
          constexpr int i = (m * NU + u) * S + j;
          const reg small = V::fma(hi[i], rest.val[j], V::fma(lo[i], factor.val[j], shift.val[j]));
          hi[i] = V::fma(hi[i], factor.val[j], small);
          finite[j % 2] = V::fma(hi[i], V::zero(), finite[j % 2]);
        });
      });
    });
    if (g.act == Act::relu) {
      unroll<N>([&](auto i) MNV4_LAMBDA { hi[i] = relu<V>(hi[i]); });
    } else if (g.act == Act::relu6) {
      unroll<N>([&](auto i) MNV4_LAMBDA { hi[i] = relu6<V>(hi[i]); });
    } else if (g.act == Act::gelu) {
      unroll<N>([&](auto i) MNV4_LAMBDA { hi[i] = V::gelu(hi[i]); });
    }
    if (res != nullptr) {
      unroll<MR>([&](auto m) MNV4_LAMBDA {
        const Half* q = res + r_off[m];
        unroll<NU * S>([&](auto j) MNV4_LAMBDA {
          constexpr int i = m * NU * S + j;
          hi[i] = V::add(hi[i], V::load(q + (j / S) * g.r_unit + (j % S) * V::W));
        });
      });
    }
    unroll<MR>([&](auto m) MNV4_LAMBDA {
      Half* q = c + c_off[m];
      unroll<NU * S>([&](auto j)
                         MNV4_LAMBDA { V::store(q + (j / S) * g.c_unit + (j % S) * V::W, hi[m * NU * S + j]); });
    });
  }
  return V::all_zero(V::add(finite[0], finite[1]));
}

// One unit of one pixel in fp32, its result rounded before the factor as torch does it: where 16 bits do not reach, and
// where infinities and NaN have to go through.
template <class V>
__attribute__((noinline)) void exact_pixel(const BasicGemmArgs<Half>& g, const Half* b, const Half* after,
                                           const Half* a, Half* c, const Half* res) {
  alignas(64) float sum[kUnit] = {};
  for (int run = 0; run < g.k_blocks; ++run) {
    const Half* p = a + (g.k_off != nullptr ? g.k_off[run] : run * g.a_blk);
    const int terms = run + 1 == g.k_blocks ? g.k_last : g.k_len;
    for (int k = 0; k < terms; ++k, b += kUnit) {
      for (int i = 0; i < kUnit; ++i) sum[i] += static_cast<float>(p[k]) * static_cast<float>(b[i]);
    }
  }
  for (int i = 0; i < kUnit; ++i) {
    const float rounded = static_cast<float>(static_cast<Half>(sum[i]));
    const float y = rounded * (static_cast<float>(after[i]) + static_cast<float>(after[kUnit + i])) +
                    static_cast<float>(after[2 * kUnit + i]);
    sum[i] = static_cast<float>(static_cast<Half>(y));
    if (g.act == Act::relu || g.act == Act::relu6) sum[i] = sum[i] < 0.0f ? 0.0f : sum[i];
    if (g.act == Act::relu6) sum[i] = sum[i] > 6.0f ? 6.0f : sum[i];
  }
  if (g.act == Act::gelu) gelu_inplace<typename V::Wide>(sum, kUnit);
  for (int i = 0; i < kUnit; ++i)
    c[i] = static_cast<Half>(sum[i] + (res != nullptr ? static_cast<float>(res[i]) : 0.0f));
}

using HalfFn = bool (*)(const BasicGemmArgs<Half>&, const Half*, const Half*, const std::ptrdiff_t*, Half*,
                        const std::ptrdiff_t*, const Half*, const std::ptrdiff_t*, int);

template <class V, int NU, bool Packed, int... M>
MNV4_INLINE HalfFn pick_half(int mr, bool fine, std::integer_sequence<int, M...>) {
  static constexpr HalfFn table[2][sizeof...(M)] = {{half_tiles<V, M + 1, NU, Packed, false>...},
                                                    {half_tiles<V, M + 1, NU, Packed, true>...}};
  return table[fine][mr - 1];
}

// `n` tiles of mr pixels and nu units
template <class Cfg, bool Packed>
void run_tiles(const BasicGemmArgs<Half>& g, int mr, int nu, const Half* b, const float* epilogue,
               const std::ptrdiff_t* a_off, Half* c, const std::ptrdiff_t* c_off, const Half* res,
               const std::ptrdiff_t* r_off, int n) {
  using V = typename Cfg::V;
  const Half* after = reinterpret_cast<const Half*>(epilogue);
  const HalfFn fn =
      nu == 1 ? pick_half<V, 1, Packed>(mr, g.fine, std::make_integer_sequence<int, Cfg::kTallRows>{})
              : pick_half<V, Cfg::kWideUnits, Packed>(mr, g.fine, std::make_integer_sequence<int, Cfg::kWideRows>{});
  if (fn(g, b, after, a_off, c, c_off, res, r_off, n)) return;
  for (int p = 0; p < n * mr; ++p) {
    for (int u = 0; u < nu; ++u) {
      exact_pixel<V>(g, b + u * g.b_unit, after + u * 4 * kUnit, g.a + a_off[p], c + c_off[p] + u * g.c_unit,
                     res == nullptr ? nullptr : res + r_off[p] + u * g.r_unit);
    }
  }
}
