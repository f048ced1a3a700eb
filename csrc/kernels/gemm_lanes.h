// The tile of the product where one element of a vector can be a factor: V::W terms of a pixel are loaded at once, and
// a unit's weights of one term by one instruction. MR * NV accumulators, MR vectors of terms and one unit of weights
// must fit into the registers: 5 x 16 leaves three of 32.
#pragma once

// Keeps loads through the returned pointer behind the making of all accumulators: ahead of their turn they would need
// registers that there are not.
template <class V, int N>
MNV4_INLINE const float* after(const float* p, typename V::reg (&acc)[N]) {
  unroll<N>([&](auto i) MNV4_LAMBDA {
    typename V::reg r = acc[i];
    p = V::after(p, r);
    acc[i] = r;
  });
  return p;
}

// `tiles` times MR pixels x NU units. Packed: pixels of A are 16 floats apart, so that one base register and immediate
// offsets address all of them.
template <class V, int MR, int NU, bool Packed>
__attribute__((noinline)) void lane_tiles(const GemmArgs& g, const float* b0, const float* bias,
                                          const std::ptrdiff_t* a_off, float* c, const std::ptrdiff_t* c_off,
                                          const float* res, const std::ptrdiff_t* r_off, int tiles) {
  using reg = typename V::reg;
  constexpr int S = kUnit / V::W, NV = NU * S;  // vectors of a unit, of a pixel
  const std::ptrdiff_t* k_off = g.k_off;
  const std::ptrdiff_t pix = g.a_pix, blk = g.a_blk;
  int runs = g.k_blocks, len = g.k_len, last = g.k_last;
  std::ptrdiff_t step = kUnit;
  if (len == kUnit && k_off == nullptr) {
    // one run whose units are a_blk apart
    last += (runs - 1) * kUnit, runs = 1, step = blk;
  }
  for (; tiles > 0; --tiles, a_off += MR, c_off += MR, r_off += MR) {
    reg acc[MR * NV];  // [MR, NU, S]
    const float* b[NU];
    unroll<NU>([&](auto u) MNV4_LAMBDA { b[u] = b0 + u * g.b_unit; });
    const float* row[MR];  // next term of each pixel; when packed, of pixel 0 only
    // one term; the weights of each unit are used up before those of the next are loaded
    auto term = [&](auto fma) MNV4_LAMBDA {
      unroll<NU>([&](auto u) MNV4_LAMBDA {
        const typename V::Unit w = V::load_unit(b[u]);
        unroll<MR>([&](auto m) MNV4_LAMBDA {
          unroll<S>([&](auto j) MNV4_LAMBDA {
            constexpr int i = m * NV + u * S + j;
            acc[i] = fma(w.val[j], acc[i], m);
          });
        });
        if constexpr (V::kTies) b[u] = after<V>(b[u], acc);
      });
    };
    // V::W terms, `at` floats on; the first ones are not added to anything
    auto quad = [&](auto at, auto first) MNV4_LAMBDA {
      reg av[MR];
      unroll<MR>([&](auto m) MNV4_LAMBDA { av[m] = V::load(Packed ? row[0] + m * kUnit + at : row[m] + at); });
      unroll<V::W>([&](auto i) MNV4_LAMBDA {
        term([&](reg w, reg sum, auto m) MNV4_LAMBDA {
          if constexpr (first && i == 0) return V::template mul_lane<i>(w, av[m]);
          return V::template fma_lane<i>(w, av[m], sum);
        });
      });
    };
    auto advance = [&](std::ptrdiff_t n)
                       MNV4_LAMBDA { unroll<Packed ? 1 : MR>([&](auto m) MNV4_LAMBDA { row[m] += n; }); };
    constexpr int Q = kUnit / V::W;
    auto start = [&](const float* p) MNV4_LAMBDA {
      row[0] = p;
      if constexpr (!Packed) unroll<MR - 1>([&](auto m) MNV4_LAMBDA { row[m + 1] = row[m] + pix; });
    };
    const float* a = g.a + a_off[0];
    start(k_off != nullptr ? a + k_off[0] : a);
    int left = runs > 1 ? len : last;
    constexpr Index<1> yes;
    constexpr Index<0> no;
    if (V::kTies && left >= kUnit) {
      quad(Index<0>{}, yes);
      unroll<Q - 1>([&](auto i) MNV4_LAMBDA { quad(Index<(i + 1) * V::W>{}, no); });
      advance(step), left -= kUnit;
    } else {
      unroll<MR * NV>([&](auto i) MNV4_LAMBDA { acc[i] = V::zero(); });
    }
    for (int run = 0;;) {
      if (left >= kUnit) {
        do {
          unroll<Q>([&](auto i) MNV4_LAMBDA { quad(Index<i * V::W>{}, no); });
          advance(step);
        } while ((left -= kUnit) >= kUnit);
      }
      for (; left >= V::W; left -= V::W) {
        quad(Index<0>{}, no);
        advance(V::W);
      }
      for (; left > 0; --left) {
        term([&](reg w, reg sum, auto m)
                 MNV4_LAMBDA { return V::fma(V::set(Packed ? row[0][m * kUnit] : row[m][0]), w, sum); });
        advance(1);
      }
      if (++run >= runs) break;
      start(a + (k_off != nullptr ? k_off[run] : run * blk));
      left = run + 1 == runs ? last : len;
    }

    auto add = [&](const float* p, const std::ptrdiff_t* off, std::ptrdiff_t unit) MNV4_LAMBDA {
      unroll<MR>([&](auto m) MNV4_LAMBDA {
        const float* q = p + off[m];
        unroll<NV>([&](auto j) MNV4_LAMBDA {
          acc[m * NV + j] = V::add(acc[m * NV + j], V::load(q + (j / S) * unit + (j % S) * V::W));
        });
      });
    };
    if (!g.first_k) add(c, c_off, g.c_unit);
    if (g.last_k) {
      // a bias that outweighs the sum would swallow its low bits if it came first
      if (bias != nullptr) {
        const float* p = bias;
        unroll<NU>([&](auto u) MNV4_LAMBDA {
          const typename V::Unit v = V::load_unit(p);
          unroll<MR>([&](auto m) MNV4_LAMBDA {
            unroll<S>([&](auto j) MNV4_LAMBDA { acc[m * NV + u * S + j] = V::add(acc[m * NV + u * S + j], v.val[j]); });
          });
        });
      }
      if (g.act == Act::relu) {
        unroll<MR * NV>([&](auto i) MNV4_LAMBDA { acc[i] = relu<V>(acc[i]); });
      } else if (g.act == Act::relu6) {
        unroll<MR * NV>([&](auto i) MNV4_LAMBDA { acc[i] = relu6<V>(acc[i]); });
      }
      if (res != nullptr && g.act != Act::gelu) add(res, r_off, g.r_unit);
    }
    // each address once: for all the compiler knows a store might change c_off
    unroll<MR>([&](auto m) MNV4_LAMBDA {
      float* p = c + c_off[m];
      unroll<NV>([&](auto j) MNV4_LAMBDA { V::store(p + (j / S) * g.c_unit + (j % S) * V::W, acc[m * NV + j]); });
    });
  }
}

// As the entry of a table.
template <class V, int MR, int NU, bool Packed>
void lane_tile(const GemmArgs& g, const float* b, const float* bias, const std::ptrdiff_t* a_off, float* c,
               const std::ptrdiff_t* c_off, const float* res, const std::ptrdiff_t* r_off, const char*,
               std::ptrdiff_t) {
  lane_tiles<V, MR, NU, Packed>(g, b, bias, a_off, c, c_off, res, r_off, 1);
}
