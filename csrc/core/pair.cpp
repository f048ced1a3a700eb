#include <algorithm>
#include <cstring>

#include "core/cpu_features.h"
#include "core/program.h"
#include "core/winograd.h"

namespace mnv4 {
namespace {

// rows of b's input that its output rows [y0, y1) read
Range input_rows(const BlockDesc& d, const Geometry& g, int y0, int y1) {
  return {std::max(0, y0 * d.expand_stride - g.top1),
          std::min(g.h, (y1 - 1) * d.expand_stride - g.top1 + d.expand_kernel)};
}

}  // namespace

template <class T>
Pair plan_pair(const BasicBlock<T>& a, const BasicBlock<T>& b, int h, int w) {
  const BlockDesc &da = a.desc(), &db = b.desc();
  if (a.has(Stage::mid) || b.has(Stage::mid) || db.expand_kernel == 1 || db.residual) return {};
  const Geometry ga = geometry(da, h, w), gb = geometry(db, ga.h2, ga.w2);
  const std::size_t row = static_cast<std::size_t>(ga.w2) * units_of(da.c_out) * kUnit, l2 = cpu_info().l2 / sizeof(T);
  if (row * ga.h2 < l2 / 2) return {};
  Pair p;
  const std::size_t rows = l2 / 4 / row;
  p.band = static_cast<int>(std::max<std::size_t>(
      1, rows > static_cast<std::size_t>(db.expand_kernel) ? (rows - db.expand_kernel) / db.expand_stride + 1 : 1));
  // Winograd computes pairs of rows
  if (winograd_serves(db) && has_winograd() && p.band > 1) p.band -= p.band % 2;
  p.band = std::min(p.band, gb.h2);
  const int most = (p.band - 1) * db.expand_stride + db.expand_kernel;
  p.between = row * most;
  for (int band = 1; band <= p.band; ++band) {
    const int need = std::min(ga.h2, (band - 1) * db.expand_stride + db.expand_kernel);
    for (int n = std::max(1, need - db.expand_kernel); n <= need; ++n)
      p.scratch = std::max(p.scratch, a.rows_floats(h, w, n));
    p.scratch = std::max(p.scratch, b.rows_floats(ga.h2, ga.w2, band));
  }
  p.scratch += p.between;
  return p;
}

template <class T>
void run_pair(const Pair& p, const BasicRegion<T>& r, const BasicBlock<T>& a, const BasicBlock<T>& b,
              const BasicTensor<T>& x, const BasicTensor<T>& out, bool padded, int n, int h, int w) {
  const Geometry ga = geometry(a.desc(), h, w), gb = geometry(b.desc(), ga.h2, ga.w2);
  T* between = r.scratch(r.tid);
  T* scratch = between + p.between;
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(ga.w2) * kUnit;
  const int units = units_of(a.desc().c_out);
  const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(p.between) / units;
  auto image = [&](int i, int lo, int hi) {
    const BasicView<T> in = x.at(i), to = out.at(i);
    Range have{0, 0};
    for (int y0 = lo; y0 < hi; y0 += p.band) {
      const int y1 = std::min(hi, y0 + p.band);
      const Range need = input_rows(b.desc(), gb, y0, y1);
      const BasicView<T> mid{between - need.lo * row, plane, row, kUnit, 1};
      // rows that the band before needed as well
      const int kept = y0 > lo ? std::max(0, have.hi - need.lo) : 0;
      for (int u = 0; u < units && kept > 0; ++u) {
        T* rows = between + u * plane;
        std::memmove(rows, rows + (need.lo - have.lo) * row, sizeof(T) * kept * row);
      }
      have = need;
      if (need.lo + kept < need.hi) a.run_alone(*r.kernels, in, mid, true, h, w, need.lo + kept, need.hi, scratch);
      b.run_alone(*r.kernels, mid, to, padded, ga.h2, ga.w2, y0, y1, scratch);
    }
  };
  const int whole = n / r.n * r.n;
  r.draw->each(whole, [&](int i, int) { image(i, 0, gb.h2); });
  const Range rows = split(gb.h2, r.n, r.tid);
  for (int i = whole; i < n; ++i) image(i, rows.lo, rows.hi);
}

#define MNV4_OPS_FOR(T)                                                                                  \
  template Pair plan_pair(const BasicBlock<T>&, const BasicBlock<T>&, int, int);                         \
  template void run_pair(const Pair&, const BasicRegion<T>&, const BasicBlock<T>&, const BasicBlock<T>&, \
                         const BasicTensor<T>&, const BasicTensor<T>&, bool, int, int, int);
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

}  // namespace mnv4
