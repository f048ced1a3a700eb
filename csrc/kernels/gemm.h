// Register-tiled product of a strip of pixels with one or more units of 16 output channels.
#pragma once

#include "kernels/gemm_lanes.h"
#include "kernels/gemm_terms.h"

inline constexpr int kStrip = 208;  // pixels handled together: 32 channels of C stay in L1 between the parts of a sum

struct Strip {
  std::ptrdiff_t a[kStrip], c[kStrip], r[kStrip];
  int left[kStrip];  // pixels from here to the end of the row (or of the strip)
};

// MR pixels x NU units. Packed: pixels of A are 16 floats apart, so that one base register and immediate offsets
// address all rows. Otherwise any stride: a base register for each third pixel, the two after it by scaled index.
template <class V, int MR, int NU, bool Packed>
void gemm_tile(const GemmArgs& g, const float* b, const float* bias, const std::ptrdiff_t* a_off, float* c,
               const std::ptrdiff_t* c_off, const float* res, const std::ptrdiff_t* r_off, const char* next,
               std::ptrdiff_t next_step) {
  using reg = typename V::reg;
  constexpr int S = kUnit / V::W;  // vectors of a unit
  constexpr int NV = NU * S;
  reg acc[MR * NV];  // [MR, NU, S]
  unroll<MR * NV>([&](auto i) MNV4_LAMBDA { acc[i] = V::zero(); });

  const std::ptrdiff_t bu = g.b_unit;
  constexpr int NB = (MR + 2) / 3;
  const float* a0 = g.a + a_off[0];
  const std::ptrdiff_t s1 = g.a_pix, s2 = 2 * g.a_pix;
  const float* base[NB];
  auto step = [&](const float* pa, const float* pb, auto kk) MNV4_LAMBDA {
    reg bv[NV];
    unroll<NV>([&](auto j) MNV4_LAMBDA { bv[j] = V::load(pb + (j / S) * bu + kk * kUnit + (j % S) * V::W); });
    unroll<MR>([&](auto m) MNV4_LAMBDA {
      reg av;
      if constexpr (Packed) {
        av = V::set(pa[m * kUnit + kk]);
      } else {
        const float* q = base[m / 3];
        av = V::set(m % 3 == 0 ? q[kk] : m % 3 == 1 ? q[s1 + kk] : q[s2 + kk]);
      }
      unroll<NV>([&](auto j) MNV4_LAMBDA { acc[m * NV + j] = V::fma(av, bv[j], acc[m * NV + j]); });
    });
  };
  const std::ptrdiff_t* k_off = g.k_off;
  for (int blk = 0; blk < g.k_blocks; ++blk) {
    int left = blk + 1 == g.k_blocks ? g.k_last : g.k_len;
    const float* pa = a0 + (k_off != nullptr ? k_off[blk] : blk * g.a_blk);
    if constexpr (!Packed) unroll<NB>([&](auto i) MNV4_LAMBDA { base[i] = pa + 3 * i * s1; });
    auto advance = [&](int n) MNV4_LAMBDA {
      pa += n, b += n * kUnit;
      if constexpr (!Packed) unroll<NB>([&](auto i) MNV4_LAMBDA { base[i] += n; });
    };
    for (; left >= 2; left -= 2) {
      __builtin_prefetch(next, 0, 2);
      next += next_step;
      unroll<2>([&](auto kk) MNV4_LAMBDA { step(pa, b, kk); });
      advance(2);
    }
    if (left > 0) {
      step(pa, b, Index<0>{});
      advance(1);
    }
  }

  if (!g.first_k) {
    unroll<MR>([&](auto m) MNV4_LAMBDA {
      unroll<NV>([&](auto j) MNV4_LAMBDA {
        acc[m * NV + j] = V::add(acc[m * NV + j], V::load(c + c_off[m] + (j / S) * g.c_unit + (j % S) * V::W));
      });
    });
  }

  if (g.last_k) {
    // a bias that outweighs the sum would swallow its low bits if it came first
    if (bias != nullptr) {
      unroll<NV>([&](auto j) MNV4_LAMBDA {
        const reg v = V::load(bias + j * V::W);
        unroll<MR>([&](auto m) MNV4_LAMBDA { acc[m * NV + j] = V::add(acc[m * NV + j], v); });
      });
    }
    if (g.act == Act::relu) {
      unroll<MR * NV>([&](auto i) MNV4_LAMBDA { acc[i] = relu<V>(acc[i]); });
    } else if (g.act == Act::relu6) {
      unroll<MR * NV>([&](auto i) MNV4_LAMBDA { acc[i] = relu6<V>(acc[i]); });
    }
    if (res != nullptr && g.act != Act::gelu) {
      unroll<MR>([&](auto m) MNV4_LAMBDA {
        unroll<NV>([&](auto j) MNV4_LAMBDA {
          acc[m * NV + j] = V::add(acc[m * NV + j], V::load(res + r_off[m] + (j / S) * g.r_unit + (j % S) * V::W));
        });
      });
    }
  }
  unroll<MR>([&](auto m) MNV4_LAMBDA {
    unroll<NV>([&](auto j)
                   MNV4_LAMBDA { V::store(c + c_off[m] + (j / S) * g.c_unit + (j % S) * V::W, acc[m * NV + j]); });
  });
}

// gelu is long: applied to the stored tile, which is still in L1, so that the tile kernels stay small.
template <class V>
void gelu_tile(const GemmArgs& g, int mr, int nu, float* c, const std::ptrdiff_t* c_off, const float* res,
               const std::ptrdiff_t* r_off) {
  const bool near = c_off[mr - 1] - c_off[0] == (mr - 1) * kUnit;
  for (int j = 0; j < nu; ++j) {
    float* to = c + j * g.c_unit;
    if (near) {
      gelu_inplace<V>(to + c_off[0], mr * kUnit);
    } else {
      for (int m = 0; m < mr; ++m) gelu_inplace<V>(to + c_off[m], kUnit);
    }
    for (int m = 0; res != nullptr && m < mr; ++m) {
      float* p = to + c_off[m];
      const float* r = res + r_off[m] + j * g.r_unit;
      for (int i = 0; i < kUnit; i += V::W) V::store(p + i, V::add(V::load(p + i), V::load(r + i)));
    }
  }
}

using TileFn = void (*)(const GemmArgs&, const float*, const float*, const std::ptrdiff_t*, float*,
                        const std::ptrdiff_t*, const float*, const std::ptrdiff_t*, const char*, std::ptrdiff_t);

template <class V, int NU, bool Packed, int... M>
MNV4_INLINE TileFn pick_tile(int mr, std::integer_sequence<int, M...>) {
  if constexpr (HasLanes<V>) {
    static constexpr TileFn table[] = {lane_tile<V, M + 1, NU, Packed>...};
    return table[mr - 1];
  } else {
    static constexpr TileFn table[] = {gemm_tile<V, M + 1, NU, Packed>...};
    return table[mr - 1];
  }
}

// Tiles of one height one after the other.
using TilesFn = void (*)(const GemmArgs&, const float*, const float*, const std::ptrdiff_t*, float*,
                         const std::ptrdiff_t*, const float*, const std::ptrdiff_t*, int);

template <class V, int NU, bool Packed, int... M>
MNV4_INLINE TilesFn pick_tiles(int mr, std::integer_sequence<int, M...>) {
  static constexpr TilesFn table[] = {lane_tiles<V, M + 1, NU, Packed>...};
  return table[mr - 1];
}

template <class Cfg, bool Packed>
void lane_units(const GemmArgs& g, const Strip& s, int pixels, int u, int nu, int max_rows) {
  using V = typename Cfg::V;
  const float* b = g.b + u * g.b_unit;
  const float* bias = g.bias == nullptr ? nullptr : g.bias + u * kUnit;
  float* c = g.c + u * g.c_unit;
  const float* res = g.res != nullptr && g.last_k ? g.res + u * g.r_unit : nullptr;
  for (int p = 0; p < pixels;) {
    // equal tiles within a segment, see gemm_units
    const int left = Packed ? pixels - p : s.left[p], tiles = (left + max_rows - 1) / max_rows;
    int mr = (left + tiles - 1) / tiles;
    for (int n = left - (mr - 1) * tiles, rest = tiles - n; n > 0; n = rest, rest = 0, --mr) {
      const TilesFn fn =
          nu == 1 ? pick_tiles<V, 1, Packed>(mr, std::make_integer_sequence<int, Cfg::kTallRows>{})
                  : pick_tiles<V, Cfg::kWideUnits, Packed>(mr, std::make_integer_sequence<int, Cfg::kWideRows>{});
      fn(g, b, bias, s.a + p, c, s.c + p, res, s.r + p, n);
      p += n * mr;
    }
  }
}

// Cfg: units and pixels of the tall tile (many pixels) and of the wide tile (few pixels).
template <class Cfg, bool Packed>
MNV4_INLINE TileFn find_tile(int mr, int nu) {
  using V = typename Cfg::V;
  if (nu == 1) return pick_tile<V, 1, Packed>(mr, std::make_integer_sequence<int, Cfg::kTallRows>{});
  if (nu == Cfg::kTallUnits)
    return pick_tile<V, Cfg::kTallUnits, Packed>(mr, std::make_integer_sequence<int, Cfg::kTallRows>{});
  return pick_tile<V, Cfg::kWideUnits, Packed>(mr, std::make_integer_sequence<int, Cfg::kWideRows>{});
}

// The weights that come after the ones at hand: memory delivers them while the tiles compute.
struct Next {
  const float* p;
  std::ptrdiff_t unit;
};

template <class Cfg, bool Packed>
void gemm_units(const GemmArgs& g, const Strip& s, int pixels, int u, int nu, int max_rows, bool partial, Next next) {
  using V = typename Cfg::V;
  if constexpr (HasLanes<V>) {
    if (!partial && g.act != Act::gelu) return lane_units<Cfg, Packed>(g, s, pixels, u, nu, max_rows);
  }
  const float* b = g.b + u * g.b_unit;
  const float* bias = g.bias == nullptr ? nullptr : g.bias + u * kUnit;
  alignas(64) float c_tmp[Cfg::kTallRows * kUnit];
  alignas(64) float r_tmp[Cfg::kTallRows * kUnit];
  float* c = g.c + u * g.c_unit;
  const float* res = g.res != nullptr && g.last_k ? g.res + u * g.r_unit : nullptr;
  // the tiles fetch in turn from the units that come next: 128 / rounds bytes every two steps of k
  const int terms = (g.k_blocks - 1) * g.k_len + g.k_last;
  const int all = (pixels + max_rows - 1) / max_rows, rounds = all > nu ? all / nu : 1;
  const std::ptrdiff_t step = next.p != b ? 128 / rounds : 0, round_bytes = terms / 2 * step;
  const char* round = reinterpret_cast<const char*>(next.p);
  int turn = 0;
  Walk walk = Walk::other;
  if constexpr (HasTerms<V>) walk = nu == 1 ? walk_of(g) : Walk::other;
  // `count` tiles of hand-written loops, pixels from p on, where this product has them
  auto by_hand = [&](int mr, int p, int count, float* to, const std::ptrdiff_t* c_off, const float* r,
                     const std::ptrdiff_t* r_off, const char* fetch, std::ptrdiff_t fetch_bytes) {
    if constexpr (HasTerms<V>) {
      if (walk == Walk::other) return false;
      const TermTilesFn fn = pick_term_tiles<V, Packed>(mr, std::make_integer_sequence<int, Cfg::kTallRows>{});
      fn(g, walk, Tiles{b, bias, to, r, s.a + p, c_off, r_off, fetch, 2 * step, fetch_bytes, count});
      return true;
    }
    return false;
  };
  // one tile of any kind
  auto tile = [&](int mr, int p, float* to, const std::ptrdiff_t* c_off, const float* r, const std::ptrdiff_t* r_off) {
    const char* fetch = round + turn * next.unit * static_cast<std::ptrdiff_t>(sizeof(float));
    if (++turn == nu) turn = 0, round += round_bytes;
    if (by_hand(mr, p, 1, to, c_off, r, r_off, fetch, 0)) return;
    find_tile<Cfg, Packed>(mr, nu)(g, b, bias, s.a + p, to, c_off, r, r_off, fetch, step);
  };
  for (int p = 0; p < pixels;) {
    // equal tiles within a segment: all pixels, or what is left of the row when the stride changes at its end
    const int left = Packed ? pixels - p : s.left[p], tiles = (left + max_rows - 1) / max_rows;
    int mr = (left + tiles - 1) / tiles;
    for (int n = left - (mr - 1) * tiles, rest = tiles - n; n > 0; n = rest, rest = 0, --mr) {
      if (!partial && g.act != Act::gelu && by_hand(mr, p, n, c, s.c + p, res, s.r + p, round, round_bytes)) {
        p += n * mr, round += n * round_bytes;
        continue;
      }
      for (int i = 0; i < n; ++i, p += mr) {
        if (!partial) {
          tile(mr, p, c, s.c + p, res, s.r + p);
          if (g.act == Act::gelu && g.last_k) gelu_tile<V>(g, mr, nu, c, s.c + p, res, s.r + p);
          continue;
        }
        // the last unit has fewer than 16 channels in C: compute in a scratch tile and copy what exists
        std::ptrdiff_t off[Cfg::kTallRows];
        for (int m = 0; m < mr; ++m) {
          off[m] = m * kUnit;
          for (int j = 0; j < g.n_last; ++j) {
            if (!g.first_k) c_tmp[m * kUnit + j] = c[s.c[p + m] + j];
            if (res != nullptr) r_tmp[m * kUnit + j] = res[s.r[p + m] + j];
          }
          for (int j = g.n_last; j < kUnit; ++j) c_tmp[m * kUnit + j] = r_tmp[m * kUnit + j] = 0.0f;
        }
        const float* r = res != nullptr ? r_tmp : nullptr;
        tile(mr, p, c_tmp, off, r, off);
        if (g.act == Act::gelu && g.last_k) gelu_tile<V>(g, mr, nu, c_tmp, off, r, off);
        for (int m = 0; m < mr; ++m) {
          for (int j = 0; j < g.n_last; ++j) c[s.c[p + m] + j] = c_tmp[m * kUnit + j];
        }
      }
    }
  }
}

// Calls f(part, end) with each part of the reduction; see kSumBlock.
template <class F>
MNV4_INLINE void for_sum_blocks(const GemmArgs& g, F f) {
  const int total = (g.k_blocks - 1) * g.k_len + g.k_last;
  // a chunk of a longer sum is cut like the whole
  if (total <= (g.first_k && g.last_k ? kSumWhole : kSumBlock)) return f(g, true);
  for (int k = 0, blk = 0; k < total;) {
    GemmArgs part = g;
    part.b += static_cast<std::ptrdiff_t>(k) * kUnit;
    int terms;
    if (g.k_blocks == 1) {
      part.a += k;
      terms = total - k < kSumBlock ? total - k : kSumBlock;
      part.k_len = part.k_last = terms;
    } else {
      // whole runs, as many as reach the block size
      const int runs = (kSumBlock + g.k_len - 1) / g.k_len;
      const bool end = blk + runs >= g.k_blocks;
      part.k_blocks = end ? g.k_blocks - blk : runs;
      part.k_last = end ? g.k_last : g.k_len;
      if (g.k_off != nullptr) {
        part.k_off += blk;
      } else {
        part.a += blk * g.a_blk;
      }
      terms = (part.k_blocks - 1) * g.k_len + part.k_last;
      blk += part.k_blocks;
    }
    part.first_k = g.first_k && k == 0;
    part.last_k = g.last_k && k + terms == total;
    f(part, k + terms == total);
    k += terms;
  }
}

template <class Cfg, bool Packed>
void gemm_strip(const GemmArgs& g, const Strip& s, int pixels) {
  const int full = g.n_last == kUnit ? g.units : g.units - 1;
  const bool wide = pixels <= Cfg::kWideRows;
  const int step = wide ? Cfg::kWideUnits : Cfg::kTallUnits;
  constexpr int rows = Cfg::kTallRows;
  int u = 0;
  auto run = [&](int nu, int max_rows, bool partial) {
    for_sum_blocks(g, [&](const GemmArgs& part, bool end) {
      const float* b = part.b + u * g.b_unit;
      Next next{b, 0};  // nothing
      if (!end) {
        next = {b + static_cast<std::ptrdiff_t>((part.k_blocks - 1) * part.k_len + part.k_last) * kUnit, g.b_unit};
      } else if (u + nu < g.units) {
        next = {g.b + (u + nu) * g.b_unit, g.b_unit};
      } else if (g.then != nullptr) {
        next = {g.then, g.then_unit};
      }
      gemm_units<Cfg, Packed>(part, s, pixels, u, nu, max_rows, partial, next);
    });
    u += nu;
  };
  while (u + step <= full) run(step, wide ? Cfg::kWideRows : rows, false);
  while (u + Cfg::kTallUnits <= full) run(Cfg::kTallUnits, rows, false);
  while (u < full) run(1, rows, false);
  if (full < g.units) run(1, rows, true);
}

template <class Cfg, class T = float>
void gemm(const BasicGemmArgs<T>& g);

// The product with each term of short runs in a list of its own, where the loop over single terms is the faster one.
template <class Cfg>
bool gemm_singles(const GemmArgs& g) {
  constexpr int most = 128;
  const int terms = g.k_blocks * g.k_len;
  if (g.k_off == nullptr || g.k_len == 1 || g.k_len >= kUnit || g.k_last != g.k_len || terms > most) return false;
  std::ptrdiff_t list[most];
  for (int i = 0; i < terms; ++i) list[i] = g.k_off[i / g.k_len] + i % g.k_len;
  GemmArgs a = g;
  a.k_off = list, a.k_blocks = terms, a.k_len = a.k_last = 1;
  gemm<Cfg>(a);
  return true;
}

template <class Cfg, class T>
void gemm(const BasicGemmArgs<T>& g) {
  if constexpr (HasTerms<typename Cfg::V>) {
    if (gemm_singles<Cfg>(g)) return;
  }
  Strip s;
  const bool one_row = g.rows == 1 || g.a_row == g.cols * g.a_pix;
  const bool packed = g.a_pix == kUnit && one_row;
  const std::ptrdiff_t end = g.p_end >= 0 ? g.p_end : static_cast<std::ptrdiff_t>(g.rows) * g.cols;
  std::ptrdiff_t y = g.p_begin / g.cols, x = g.p_begin % g.cols;
  for (std::ptrdiff_t p = g.p_begin; p < end;) {
    int n = static_cast<int>(end - p < kStrip ? end - p : kStrip);
    if (!one_row) {
      // tiles do not run on into the next row: a strip ends where a row does
      const std::ptrdiff_t row = g.cols - x;
      if (row <= n && n < end - p) n = static_cast<int>(row + (n - row) / g.cols * g.cols);
    }
    for (int i = 0; i < n;) {
      const int count = static_cast<int>(g.cols - x < n - i ? g.cols - x : n - i);
      const std::ptrdiff_t a0 = y * g.a_row + x * g.a_pix, c0 = y * g.c_row + x * g.c_pix,
                           r0 = y * g.r_row + x * g.r_pix;
      for (int j = 0; j < count; ++j) {
        s.a[i + j] = a0 + j * g.a_pix;
        s.c[i + j] = c0 + j * g.c_pix;
        s.left[i + j] = one_row ? n - i - j : count - j;
      }
      if (g.res != nullptr) {
        for (int j = 0; j < count; ++j) s.r[i + j] = r0 + j * g.r_pix;
      }
      i += count, x += count;
      if (x == g.cols) x = 0, ++y;
    }
    if (packed) {
      gemm_strip<Cfg, true>(g, s, n);
    } else {
      gemm_strip<Cfg, false>(g, s, n);
    }
    p += n;
  }
}
