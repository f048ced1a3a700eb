// How a product of 16-bit elements is cut into tiles: those of run_tiles, each with the whole of its sum.
#pragma once

template <class Cfg, bool Packed, class E>
void tile_units(const BasicGemmArgs<E>& g, const Strip& s, int pixels, int u, int nu, int max_rows, bool partial) {
  const E* b = g.b + u * g.b_unit;
  const float* epilogue = g.bias + u * kEpilogue<E>;
  E* c = g.c + u * g.c_unit;
  const E* res = g.res != nullptr ? g.res + u * g.r_unit : nullptr;
  int p = 0;
  auto run = [&](int mr, int n) {
    if (!partial) {
      if (n > 0) run_tiles<Cfg, Packed>(g, mr, nu, b, epilogue, s.a + p, c, s.c + p, res, s.r + p, n);
      p += n * mr;
      return;
    }
    // the last unit has fewer than 16 channels in C: tiles in scratch, and what exists is copied
    for (int i = 0; i < n; ++i, p += mr) {
      alignas(64) E made[Cfg::kTallRows * kUnit], added[Cfg::kTallRows * kUnit];
      std::ptrdiff_t off[Cfg::kTallRows];
      for (int m = 0; m < mr; ++m) {
        off[m] = m * kUnit;
        for (int j = 0; j < kUnit; ++j)
          added[m * kUnit + j] = res != nullptr && j < g.n_last ? res[s.r[p + m] + j] : static_cast<E>(0.0f);
      }
      run_tiles<Cfg, Packed>(g, mr, 1, b, epilogue, s.a + p, made, off, res != nullptr ? added : nullptr, off, 1);
      for (int m = 0; m < mr; ++m) {
        for (int j = 0; j < g.n_last; ++j) c[s.c[p + m] + j] = made[m * kUnit + j];
      }
    }
  };
  while (p < pixels) {
    // equal tiles within a segment: all pixels, or what is left of the row when the stride changes at its end. Where
    // pixels go in pairs, all but the last tile have an even number.
    constexpr int step = Cfg::kPixelsAtOnce;
    const int left = Packed ? pixels - p : s.left[p], steps = (left + step - 1) / step, most = max_rows / step;
    const int tiles = (steps + most - 1) / most, tall = (steps + tiles - 1) / tiles, missing = steps * step - left;
    const int n = steps - (tall - 1) * tiles;  // as tall as that, the others a step less
    const bool equal = n == tiles;
    run(tall * step, n - (equal && missing > 0));
    if (!equal) run((tall - 1) * step, tiles - n - (missing > 0));
    if (missing > 0) run((equal ? tall : tall - 1) * step - missing, 1);
  }
}

template <class Cfg, bool Packed, class E>
void gemm_strip(const BasicGemmArgs<E>& g, const Strip& s, int pixels) {
  const int full = g.n_last == kUnit ? g.units : g.units - 1;
  int u = 0;
  if (pixels <= Cfg::kWideRows) {
    for (; u + Cfg::kWideUnits <= full; u += Cfg::kWideUnits)
      tile_units<Cfg, Packed>(g, s, pixels, u, Cfg::kWideUnits, Cfg::kWideRows, false);
  }
  for (; u < g.units; ++u) tile_units<Cfg, Packed>(g, s, pixels, u, 1, Cfg::kTallRows, u == full);
}

template <class E>
MNV4_INLINE void copy_terms(const E* from, int n, E* to) {
  // what does not come out even is copied with the elements before it
  const auto by = [&](auto size) MNV4_LAMBDA {
    int i = 0;
    do {
      std::memcpy(to + i, from + i, size * sizeof(E));
    } while ((i += size) + size <= n);
    if (i < n) std::memcpy(to + n - size, from + n - size, size * sizeof(E));
  };
  if (n >= 8) {
    by(Index<8>{});
  } else if (n >= 4) {
    by(Index<4>{});
  } else {
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
}

// The product, with the short runs of a few input channels copied, one behind the other and zeros behind them.
template <class Cfg, class E>
void gemm_whole(const BasicGemmArgs<E>& g) {
  constexpr int most = 112;  // 5 x 5 taps of 4 channels, rounded up
  constexpr std::ptrdiff_t step = packed_terms<E>(1);
  const int terms = (g.k_blocks - 1) * g.k_len + g.k_last, pitch = static_cast<int>(packed_terms<E>(terms));
  if (g.k_len % step == 0 || g.k_blocks == 1 || pitch > most) return gemm<Cfg, E>(g);
  E copy[kStrip * most];
  const std::ptrdiff_t end = g.p_end >= 0 ? g.p_end : static_cast<std::ptrdiff_t>(g.rows) * g.cols;
  BasicGemmArgs<E> part = g;
  part.k_off = nullptr, part.k_blocks = 1, part.k_len = part.k_last = pitch;
  part.a_pix = pitch, part.a_row = static_cast<std::ptrdiff_t>(g.cols) * pitch;
  std::ptrdiff_t y = g.p_begin / g.cols, x = g.p_begin % g.cols;
  for (std::ptrdiff_t p = g.p_begin; p < end;) {
    part.p_begin = p, part.p_end = end - p < kStrip ? end : p + kStrip;
    part.a = copy - p * pitch;
    for (E* to = copy; p < part.p_end; ++p) {
      const E* a = g.a + y * g.a_row + x * g.a_pix;
      E* const next = to + pitch;
      std::memset(next - step, 0, step * sizeof(E));
      for (int run = 0; run < g.k_blocks; ++run, to += g.k_len)
        copy_terms(a + (g.k_off != nullptr ? g.k_off[run] : run * g.a_blk), g.k_len, to);
      to = next;
      if (++x == g.cols) x = 0, ++y;
    }
    gemm<Cfg, E>(part);
  }
}
