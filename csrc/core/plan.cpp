#include <algorithm>

#include "core/block.h"
#include "core/cpu_features.h"
#include "core/winograd.h"

namespace mnv4 {
namespace {

constexpr std::size_t kSmallL2 = 1 << 20;  // bytes; measured with 512 KiB; with 1 MiB bands are seldom thin
constexpr int kThin = 64;  // output pixels of a band below which reading the weights again costs more than it saves

}  // namespace

// Three ways, in this order: all rows at once in chunks of units (weights are read once); bands of rows over a ring
// that keeps all units (nothing is computed twice); bands in chunks whose halo rows are computed again. The first two
// may take more than their part of L2 where that spares the next way.
template <class T>
Plan BasicBlock<T>::plan(const Geometry& g, int rows, int team) const {
  const std::size_t l2 = cpu_info().l2 / sizeof(T);
  // scratch: a part of L2, so that weights and the block's input and output have room beside it
  const std::size_t budget = l2 * 3 / 4 * team, most_room = l2 * 5 / 4 * team;
  const int ui = units_of(d_.c_in), ue = units_of(d_.c_mid);
  const bool dense = d_.expand_kernel > 1, mid = has(Stage::mid), winograd = winograd_ > 0 && has_winograd();
  const int k1 = dense ? d_.expand_kernel : d_.start_kernel, s1 = dense ? d_.expand_stride : d_.start_stride;
  const std::size_t pitch1 = static_cast<std::size_t>(g.left1) + g.w + g.right1;
  const std::size_t pitch2 = static_cast<std::size_t>(g.left2 + g.w1 + g.right2) * kUnit;

  auto sizes = [&](int band, int chunk, bool ring) {
    Plan p;
    p.band = band, p.chunk = chunk, p.ring = ring;
    const int rows1 = mid ? std::min(g.h1, (band - 1) * d_.mid_stride + d_.mid_kernel) : band;  // rows after the front
    // a ring computes what each band after the first needs, and before the first as much at a time
    p.step = ring && band < rows ? std::min(rows1, band * d_.mid_stride) : rows1;
    const int rows0 = k1 > 0 ? (p.step - 1) * s1 + k1 : 0;
    if (has(Stage::start)) {
      p.front = static_cast<std::size_t>(ui) * p.step * g.w1 * kUnit;
      p.local = round_line(rows0 * pitch1 * kUnit);
    } else if (dense) {
      const std::size_t patches = static_cast<std::size_t>(kPatches) * k1 * k1 * d_.c_in;
      p.local = round_line(copies_rows(d_) ? copied_floats(d_, g, band) : patches);
      if (winograd) p.local += winograd_floats(d_, g);
    }
    if (mid) {
      p.ring_rows = rows1;
      p.expanded = static_cast<std::size_t>(ring ? ue : chunk) * rows1 * pitch2;
    }
    if (d_.project && d_.expand) p.middle = static_cast<std::size_t>(chunk) * band * g.w2 * kUnit;
    return p;
  };
  auto fits = [&](const Plan& p, std::size_t room) { return p.shared() + p.local * team <= room; };
  // parts of equal height; Winograd computes pairs of rows
  auto even_band = [&](int band) {
    const int parts = (rows + band - 1) / band, each = (rows + parts - 1) / parts;
    return winograd && each < rows ? each + each % 2 : each;
  };

  // the project stage sums chunk by chunk: a chunk ends where a block of the sum does, so that no plan changes a result
  const bool one_sum = d_.c_mid <= kSumWhole || sizeof(T) != sizeof(float);  // 16 bits cannot hold parts of a sum
  const int grain = one_sum ? ue : kSumBlock / kUnit;
  const int most = (ue + grain - 1) / grain * grain;
  Plan none;
  none.band = 0;
  // in at most `room` floats
  auto all_rows = [&](std::size_t room) {
    for (int chunk = most; chunk >= grain; chunk -= grain) {
      const Plan p = sizes(rows, std::min(chunk, ue), false);
      if (fits(p, room)) return p;
    }
    return none;
  };
  auto bands = [&](std::size_t room) {
    for (int band = rows; band >= 1; --band) {
      const Plan p = sizes(even_band(band), ue, mid);
      if (fits(p, room)) return p;
    }
    return none;
  };
  const Plan whole = all_rows(budget);
  if (whole.band > 0) return whole;
  const Plan ring = bands(budget);
  if (ring.band * g.w2 >= kThin) return ring;
  if (cpu_info().l2 < kSmallL2) {
    // thin products read all weights for a few pixels: a scratch of a little more than L2 costs less
    if (ring.band < rows) {
      const Plan p = all_rows(most_room);
      if (p.band > 0) return p;
    }
    const Plan p = bands(l2 * team);
    if (p.band > 0) return p;
  }
  if (ring.band > 0) return ring;
  if (mid) {
    // a ring of a little more than L2 costs less than rows that are computed again
    const Plan p = sizes(1, ue, true);
    if (fits(p, most_room)) return p;
  }
  for (int band = std::min(rows, 8); band >= 1; --band) {
    for (int chunk = most; chunk >= grain; chunk -= grain) {
      const Plan p = sizes(band, std::min(chunk, ue), false);
      if (fits(p, budget)) return p;
    }
  }
  return sizes(1, std::min(grain, ue), false);  // a single row is wider than the budget
}

#define MNV4_OPS_FOR(T) template Plan BasicBlock<T>::plan(const Geometry&, int, int) const;
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

}  // namespace mnv4
