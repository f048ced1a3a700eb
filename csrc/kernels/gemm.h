// Register-tiled product of a strip of pixels with one or more units of 16 output channels.
#pragma once

inline constexpr int kStrip = 512;  // pixels whose offsets are kept at once

struct Strip {
  std::ptrdiff_t a[kStrip], c[kStrip], r[kStrip];
};

// MR pixels x NU units. Packed: pixels of A are 16 floats apart, so that one base register and immediate offsets address all rows.
template <class V, int MR, int NU, bool Packed>
void gemm_tile(const GemmArgs& g, const float* b, const float* bias, const std::ptrdiff_t* a_off, float* c,
               const std::ptrdiff_t* c_off, const float* res, const std::ptrdiff_t* r_off) {
  using reg = typename V::reg;
  constexpr int S = kUnit / V::W;  // vectors of a unit
  constexpr int NV = NU * S;
  reg acc[MR * NV];  // [MR, NU, S]
  if (g.first_k) {
    unroll<NV>([&](auto j) MNV4_LAMBDA {
      const reg v = V::load(bias + j * V::W);
      unroll<MR>([&](auto m) MNV4_LAMBDA { acc[m * NV + j] = v; });
    });
  } else {
    unroll<MR>([&](auto m) MNV4_LAMBDA {
      unroll<NV>([&](auto j) MNV4_LAMBDA { acc[m * NV + j] = V::load(c + c_off[m] + (j / S) * g.c_unit + (j % S) * V::W); });
    });
  }

  const std::ptrdiff_t bu = g.b_unit;
  const float* a0 = g.a + a_off[0];
  const float* ap[MR];
  if constexpr (!Packed) unroll<MR>([&](auto m) MNV4_LAMBDA { ap[m] = g.a + a_off[m]; });
  auto step = [&](const float* pa, const float* pb, std::ptrdiff_t k, auto kk) MNV4_LAMBDA {
    reg bv[NV];
    unroll<NV>([&](auto j) MNV4_LAMBDA { bv[j] = V::load(pb + (j / S) * bu + kk * kUnit + (j % S) * V::W); });
    unroll<MR>([&](auto m) MNV4_LAMBDA {
      reg av;
      if constexpr (Packed) {
        av = V::set(pa[m * kUnit + kk]);
      } else {
        av = V::set(ap[m][k + kk]);
      }
      unroll<NV>([&](auto j) MNV4_LAMBDA { acc[m * NV + j] = V::fma(av, bv[j], acc[m * NV + j]); });
    });
  };
  std::ptrdiff_t blk_off = 0;
  for (int blk = g.k_blocks; blk > 0; --blk) {
    const int len = blk == 1 ? g.k_last : g.k_len;
    const float* pa = a0 + blk_off;
    std::ptrdiff_t k = blk_off;
    int left = len;
    for (; left >= 4; left -= 4) {
      unroll<4>([&](auto kk) MNV4_LAMBDA { step(pa, b, k, kk); });
      pa += 4, k += 4, b += 4 * kUnit;
    }
    for (; left > 0; --left) {
      step(pa, b, k, Index<0>{});
      ++pa, ++k, b += kUnit;
    }
    blk_off += g.a_blk;
  }

  if (g.last_k) {
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
    unroll<NV>([&](auto j) MNV4_LAMBDA { V::store(c + c_off[m] + (j / S) * g.c_unit + (j % S) * V::W, acc[m * NV + j]); });
  });
}

// gelu is long: applied to the stored tile, which is still in L1, so that the tile kernels stay small.
template <class V>
void gelu_tile(const GemmArgs& g, int mr, int nu, float* c, const std::ptrdiff_t* c_off, const float* res,
               const std::ptrdiff_t* r_off) {
  for (int m = 0; m < mr; ++m) {
    for (int j = 0; j < nu; ++j) {
      float* p = c + c_off[m] + j * g.c_unit;
      for (int i = 0; i < kUnit; i += V::W) {
        typename V::reg v = gelu<V>(V::load(p + i));
        if (res != nullptr) v = V::add(v, V::load(res + r_off[m] + j * g.r_unit + i));
        V::store(p + i, v);
      }
    }
  }
}

using TileFn = void (*)(const GemmArgs&, const float*, const float*, const std::ptrdiff_t*, float*, const std::ptrdiff_t*,
                        const float*, const std::ptrdiff_t*);

template <class V, int NU, bool Packed, int... M>
MNV4_INLINE TileFn pick_tile(int mr, std::integer_sequence<int, M...>) {
  static constexpr TileFn table[] = {gemm_tile<V, M + 1, NU, Packed>...};
  return table[mr - 1];
}

// Cfg: units and pixels of the tall tile (many pixels), of the wide tile (few pixels), and of the tile with free pixel strides.
template <class Cfg, bool Packed>
MNV4_INLINE TileFn find_tile(int mr, int nu) {
  using V = typename Cfg::V;
  if constexpr (Packed) {
    if (nu == 1) return pick_tile<V, 1, true>(mr, std::make_integer_sequence<int, Cfg::kTallRows>{});
    if (nu == Cfg::kTallUnits) return pick_tile<V, Cfg::kTallUnits, true>(mr, std::make_integer_sequence<int, Cfg::kTallRows>{});
    return pick_tile<V, Cfg::kWideUnits, true>(mr, std::make_integer_sequence<int, Cfg::kWideRows>{});
  } else {
    if (nu == 1) return pick_tile<V, 1, false>(mr, std::make_integer_sequence<int, Cfg::kFreeRows>{});
    if (nu == Cfg::kTallUnits) return pick_tile<V, Cfg::kTallUnits, false>(mr, std::make_integer_sequence<int, Cfg::kFreeRows>{});
    return pick_tile<V, Cfg::kWideUnits, false>(mr, std::make_integer_sequence<int, Cfg::kWideRows>{});
  }
}

template <class Cfg, bool Packed>
void gemm_units(const GemmArgs& g, const Strip& s, int pixels, int u, int nu, int max_rows, bool partial) {
  using V = typename Cfg::V;
  const int tiles = (pixels + max_rows - 1) / max_rows;
  const float* b = g.b + u * g.b_unit;
  const float* bias = g.bias == nullptr ? nullptr : g.bias + u * kUnit;
  alignas(64) float c_tmp[Cfg::kMaxRows * kUnit];
  alignas(64) float r_tmp[Cfg::kMaxRows * kUnit];
  for (int t = 0, p = 0; t < tiles; ++t) {
    const int mr = (pixels - p + (tiles - t) - 1) / (tiles - t);
    const TileFn fn = find_tile<Cfg, Packed>(mr, nu);
    float* c = g.c + u * g.c_unit;
    const float* res = g.res != nullptr && g.last_k ? g.res + u * g.r_unit : nullptr;
    if (!partial) {
      fn(g, b, bias, s.a + p, c, s.c + p, res, s.r + p);
      if (g.act == Act::gelu && g.last_k) gelu_tile<V>(g, mr, nu, c, s.c + p, res, s.r + p);
    } else {
      // the last unit has fewer than 16 channels in C: compute in a scratch tile and copy what exists
      std::ptrdiff_t off[Cfg::kMaxRows];
      for (int m = 0; m < mr; ++m) {
        off[m] = m * kUnit;
        for (int i = 0; i < g.n_last; ++i) {
          if (!g.first_k) c_tmp[m * kUnit + i] = c[s.c[p + m] + i];
          if (res != nullptr) r_tmp[m * kUnit + i] = res[s.r[p + m] + i];
        }
        for (int i = g.n_last; i < kUnit; ++i) c_tmp[m * kUnit + i] = r_tmp[m * kUnit + i] = 0.0f;
      }
      const float* r = res != nullptr ? r_tmp : nullptr;
      fn(g, b, bias, s.a + p, c_tmp, off, r, off);
      if (g.act == Act::gelu && g.last_k) gelu_tile<V>(g, mr, nu, c_tmp, off, r, off);
      for (int m = 0; m < mr; ++m) {
        for (int i = 0; i < g.n_last; ++i) c[s.c[p + m] + i] = c_tmp[m * kUnit + i];
      }
    }
    p += mr;
  }
}

template <class Cfg, bool Packed>
void gemm_strip(const GemmArgs& g, const Strip& s, int pixels) {
  const int full = g.n_last == kUnit ? g.units : g.units - 1;
  const bool wide = pixels <= Cfg::kWideRows;
  const int step = wide ? Cfg::kWideUnits : Cfg::kTallUnits;
  const int rows = Packed ? Cfg::kTallRows : Cfg::kFreeRows;
  int u = 0;
  for (; u + step <= full; u += step) gemm_units<Cfg, Packed>(g, s, pixels, u, step, wide ? Cfg::kWideRows : rows, false);
  if (wide && Cfg::kTallUnits < Cfg::kWideUnits) {
    for (; u + Cfg::kTallUnits <= full; u += Cfg::kTallUnits) gemm_units<Cfg, Packed>(g, s, pixels, u, Cfg::kTallUnits, rows, false);
  }
  for (; u < full; ++u) gemm_units<Cfg, Packed>(g, s, pixels, u, 1, rows, false);
  if (full < g.units) gemm_units<Cfg, Packed>(g, s, pixels, full, 1, rows, true);
}

template <class Cfg>
void gemm(const GemmArgs& g) {
  Strip s;
  const bool packed = g.a_pix == kUnit && (g.rows == 1 || g.a_row == static_cast<std::ptrdiff_t>(g.cols) * kUnit);
  const std::ptrdiff_t end = g.p_end >= 0 ? g.p_end : static_cast<std::ptrdiff_t>(g.rows) * g.cols;
  std::ptrdiff_t y = g.p_begin / g.cols, x = g.p_begin % g.cols;
  for (std::ptrdiff_t p = g.p_begin; p < end;) {
    const int n = static_cast<int>(end - p < kStrip ? end - p : kStrip);
    for (int i = 0; i < n; ++i) {
      s.a[i] = y * g.a_row + x * g.a_pix;
      s.c[i] = y * g.c_row + x * g.c_pix;
      s.r[i] = y * g.r_row + x * g.r_pix;
      if (++x == g.cols) x = 0, ++y;
    }
    if (packed) {
      gemm_strip<Cfg, true>(g, s, n);
    } else {
      gemm_strip<Cfg, false>(g, s, n);
    }
    p += n;
  }
}
