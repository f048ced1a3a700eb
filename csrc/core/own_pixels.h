// Scratch of a thread that keeps to its own pixels of every stage, apart from that of the others: with the pixels of
// two threads side by side in one plane, the prefetcher of each runs into the lines that the other one writes.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/block.h"

namespace mnv4 {

/// Sizes in elements, for a team of n threads; the same in all of them.
struct OwnPixels {
  int n = 0, halo = 0, stride = 1, top = 0;    // halo: rows of the mid depthwise, 0 without
  int w1 = 0, h1 = 0, p1 = 0, w2 = 0, p2 = 0;  // rows and pixels after the front, after the mid depthwise
  int rows = 0;                                // most rows of expanded pixels that a thread needs
  std::ptrdiff_t pitch = 0, left = 0;
  std::ptrdiff_t front_unit = 0, expanded_unit = 0, middle_unit = 0;
  std::ptrdiff_t front = 0, expanded = 0, middle = 0;

  OwnPixels() = default;
  OwnPixels(const BlockDesc& d, const Geometry& g, const Plan& p, int threads) {
    n = threads, halo = d.mid_kernel, stride = d.mid_stride, top = g.top2;
    w1 = g.w1, h1 = g.h1, p1 = g.h1 * g.w1, w2 = g.w2, p2 = g.h2 * g.w2;
    pitch = static_cast<std::ptrdiff_t>(g.left2 + g.w1 + g.right2) * kUnit;
    left = static_cast<std::ptrdiff_t>(g.left2) * kUnit;
    front_unit = static_cast<std::ptrdiff_t>((p1 + n - 1) / n) * kUnit;
    middle_unit = static_cast<std::ptrdiff_t>((p2 + n - 1) / n) * kUnit;
    if (halo > 0)
      for (int t = 0; t < n; ++t) rows = std::max(rows, expanded_rows(t).hi - expanded_rows(t).lo);
    expanded_unit = pitch * rows;
    if (p.front > 0) front = front_unit * units_of(d.c_in);
    expanded = expanded_unit * p.chunk;
    if (p.middle > 0) middle = middle_unit * p.chunk;
  }
  std::size_t floats() const { return static_cast<std::size_t>(front + expanded + middle); }

  /// Rows of expanded pixels that a thread makes or reads.
  Range expanded_rows(int tid) const {
    const Range in = split(p1, n, tid), out = split(p2, n, tid);
    Range r{in.lo / w1, in.hi > in.lo ? (in.hi - 1) / w1 + 1 : in.lo / w1};
    if (out.hi > out.lo) {
      r.lo = std::min(r.lo, std::max(0, out.lo / w2 * stride - top));
      r.hi = std::max(r.hi, std::min(h1, (out.hi - 1) / w2 * stride - top + halo));
    }
    return r;
  }

  /// Fetches what the others have expanded in the rows of thread tid; area(t) is the expanded part of their scratch.
  template <class Area>
  void copy_halo(int tid, int units, Area area) const {
    const Range rows = expanded_rows(tid);
    auto* to = area(tid);
    for (int t = 0; t < n; ++t) {
      if (t == tid) continue;
      const Range theirs = split(p1, n, t);
      const int lo = std::max(theirs.lo, rows.lo * w1), hi = std::min(theirs.hi, rows.hi * w1);
      const int first = expanded_rows(t).lo;
      for (int q = lo; q < hi;) {
        const int y = q / w1, x = q % w1, end = std::min(hi, (y + 1) * w1);
        const auto* src = area(t) + (y - first) * pitch + left + static_cast<std::ptrdiff_t>(x) * kUnit;
        auto* dst = to + (y - rows.lo) * pitch + left + static_cast<std::ptrdiff_t>(x) * kUnit;
        for (int i = 0; i < units; ++i)
          std::memcpy(dst + i * expanded_unit, src + i * expanded_unit, sizeof *dst * kUnit * (end - q));
        q = end;
      }
    }
  }
};

}  // namespace mnv4
