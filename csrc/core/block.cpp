#include "core/block.h"

#include <algorithm>
#include <cstring>

#include "core/own_pixels.h"
#include "core/rows.h"
#include "core/winograd.h"

namespace mnv4 {
namespace {

constexpr int kOwnPixels = 64;  // expanded pixels of a thread from which on it is worth reading all weights for them

}  // namespace

template <class T>
BasicBlock<T>::BasicBlock(const BlockDesc& d) : d_(d) {
  auto place = [&](Stage s, int units, std::size_t weights_of_unit) {
    const int i = static_cast<int>(s);
    weight_[i] = total_;
    bias_[i] = total_ + units * weights_of_unit * sizeof(T) / sizeof(float);
    total_ = bias_[i] + static_cast<std::size_t>(units) * kEpilogue<T>;
  };
  if (has(Stage::start))
    place(Stage::start, units_of(d.c_in), static_cast<std::size_t>(d.start_kernel) * d.start_kernel * kUnit);
  if (has(Stage::expand)) place(Stage::expand, units_of(d.c_mid), expand_unit());
  if (has(Stage::mid))
    place(Stage::mid, units_of(d.c_mid), static_cast<std::size_t>(d.mid_kernel) * d.mid_kernel * kUnit);
  if (has(Stage::project)) place(Stage::project, units_of(d.c_out), project_unit());
  if (std::is_same_v<T, float> && winograd_serves(d)) {
    winograd_ = total_;
    total_ += static_cast<std::size_t>(units_of(d.c_mid)) * winograd_unit(d);
  }
}

template <class T>
bool BasicBlock<T>::has(Stage s) const {
  switch (s) {
    case Stage::start: return d_.start_kernel > 0;
    case Stage::expand: return d_.expand;
    case Stage::mid: return d_.mid_kernel > 0;
    case Stage::project: return d_.project;
  }
  return false;
}

template <class T>
bool BasicBlock<T>::pack(Stage s, const StageParams& p) {
  if (!has(s)) return false;
  if (data_ == nullptr) data_ = make_buffer(total_);
  if (data_ == nullptr) return false;
  const int i = static_cast<int>(s);
  T* w = reinterpret_cast<T*>(data_.get() + weight_[i]);
  float* b = data_.get() + bias_[i];
  switch (s) {
    case Stage::start: pack_depthwise(p, d_.c_in, d_.start_kernel, w, b); break;
    case Stage::expand:
      pack_gemm(p, d_.c_mid, d_.c_in, d_.expand_kernel, w, b);
      if (winograd_ > 0) pack_winograd(p, d_.c_mid, d_.c_in, data_.get() + winograd_);
      break;
    case Stage::mid: pack_depthwise(p, d_.c_mid, d_.mid_kernel, w, b); break;
    case Stage::project: pack_gemm(p, d_.c_out, d_.c_mid, 1, w, b); break;
  }
  done_[i] = true, fine_[i] = p.bn_mean == nullptr;
  return true;
}

template <class T>
void BasicBlock<T>::adopt(const float* blob) {
  if (data_ == nullptr) data_ = make_buffer(total_);
  if (data_ == nullptr) return;
  std::memcpy(data_.get(), blob, total_ * sizeof(float));
  for (int i = 0; i < kStages; ++i) done_[i] = has(static_cast<Stage>(i));
}

template <class T>
BasicUpcoming<T> BasicBlock<T>::upcoming() const {
  if (d_.expand) return {weight(Stage::expand), expand_unit(), units_of(d_.c_mid)};
  if (d_.project) return {weight(Stage::project), project_unit(), units_of(d_.c_out)};
  return {};
}

template <class T>
bool BasicBlock<T>::packed() const {
  for (int i = 0; i < kStages; ++i) {
    if (has(static_cast<Stage>(i)) && !done_[i]) return false;
  }
  return true;
}

template <class T>
void gemm_split(const BasicKernels<T>& k, const BasicTeam<T>& t, BasicGemmArgs<T> g) {
  const int pixels = g.rows * g.cols;
  if (t.n == 1) {
    if (pixels > 0 && g.units > 0) k.gemm(g);
    return;
  }
  if (t.own_pixels) {
    const Range own = t.pixels(0, pixels);
    g.p_begin = own.lo, g.p_end = own.hi;
    if (own.hi > own.lo && g.units > 0) k.gemm(g);
    return;
  }
  // groups of units, each in parts of pixels where there are few groups
  const int size = g.units >= 4 * kTask * t.n ? kTask : 2, groups = (g.units + size - 1) / size;
  const int parts = std::max(1, std::min((4 * t.n + groups - 1) / groups, pixels / 24));
  t.share(groups * parts, 1, [&](int i, int, int next) {
    const int lo = i / parts * size, hi = std::min(g.units, lo + size);
    const Range p = split(pixels, parts, i % parts);
    BasicGemmArgs<T> part = g;
    if (hi < g.units) part.n_last = kUnit;
    part.b += lo * g.b_unit;
    if (g.bias != nullptr) part.bias += lo * kEpilogue<T>;
    part.c += lo * g.c_unit;
    if (g.res != nullptr) part.res += lo * g.r_unit;
    part.units = hi - lo;
    part.p_begin = p.lo, part.p_end = p.hi;
    if (next >= 0) part.then = g.b + next / parts * size * g.b_unit, part.then_unit = g.b_unit;
    k.gemm(part);
  });
}

namespace {

// Asks for lines that another thread has written: all at once, since each may be a long way off.
template <class T>
void fetch(const T* p, std::ptrdiff_t elements) {
  for (std::ptrdiff_t i = 0; i < elements; i += 64 / static_cast<std::ptrdiff_t>(sizeof(T)))
    __builtin_prefetch(p + i, 0, 2);
}

}  // namespace

template <class T>
void BasicBlock<T>::run_rows(const BasicKernels<T>& k, const BasicTeam<T>& t, const BasicView<T>& x,
                             const BasicView<T>& out, int n_last, const Geometry& g, int y0, int y1) const {
  const Plan p = plan(g, y1 - y0, t.n);
  const int ui = units_of(d_.c_in), ue = units_of(d_.c_mid), uo = units_of(d_.c_out);
  const bool is_dense = d_.expand_kernel > 1, mid = has(Stage::mid), start = has(Stage::start);
  const int k1 = d_.start_kernel, s1 = d_.start_stride;
  const bool alone = !d_.expand && !d_.project;
  const int k2 = d_.mid_kernel, s2 = d_.mid_stride;
  const std::ptrdiff_t pitch1 = static_cast<std::ptrdiff_t>(g.left1 + g.w + g.right1) * kUnit;
  const std::ptrdiff_t pitch2 = static_cast<std::ptrdiff_t>(g.left2 + g.w1 + g.right2) * kUnit;
  const bool shared = t.n > 1 && !t.own_pixels;  // the work of a stage is dealt out over the threads
  // one's own pixels lie alone, as if those of the others were in front of them
  const OwnPixels own = t.own_pixels ? OwnPixels(d_, g, p, t.n) : OwnPixels();
  const Range own_rows = t.own_pixels && mid ? own.expanded_rows(t.tid) : Range{0, 0};
  const std::ptrdiff_t plane2 = t.own_pixels ? own.expanded_unit : pitch2 * p.ring_rows;
  T* front = t.shared;
  T* expanded = front + (t.own_pixels ? own.front : static_cast<std::ptrdiff_t>(p.front));
  T* middle = expanded + (t.own_pixels ? own.expanded : static_cast<std::ptrdiff_t>(p.expanded));
  if (t.own_pixels) {
    front -= static_cast<std::ptrdiff_t>(t.pixels(0, g.h1 * g.w1).lo) * kUnit;
    middle -= static_cast<std::ptrdiff_t>(t.pixels(0, g.h2 * g.w2).lo) * kUnit;
  }

  int have = 0;  // expanded rows below this one are in the ring
  for (int o0 = y0, o1; o0 < y1; o0 = o1) {
    o1 = std::min(y1, o0 + p.band);
    const int e0 = mid ? (t.own_pixels ? 0 : std::max(0, o0 * s2 - g.top2)) : o0;
    const int e1 = mid ? (t.own_pixels ? g.h1 : std::min(g.h1, (o1 - 1) * s2 - g.top2 + k2)) : o1;
    const int n0 = p.ring ? std::max(e0, have) : e0;  // rows to compute now
    int n1 = std::max(n0, e1);
    if (n1 - n0 > p.step && !t.own_pixels) n1 = n0 + p.step, o1 = o0;  // more rows have to be in the ring before a band
    const int rows = n1 - n0;
    have = n1;

    const std::ptrdiff_t front_plane = t.own_pixels ? own.front_unit : static_cast<std::ptrdiff_t>(rows) * g.w1 * kUnit;
    // front: start depthwise of all input units
    const Range front_pixels = t.pixels(n0 * g.w1, n1 * g.w1);
    if (start && front_pixels.hi > front_pixels.lo) {
      const int lo = front_pixels.lo / g.w1 * s1 - g.top1, hi = (front_pixels.hi - 1) / g.w1 * s1 - g.top1 + k1;
      t.share(ui, 1, [&](int first, int end, int) {
        for (int i = first, n = 1; i < end; i += n) {
          const int channels = std::min(kUnit, d_.c_in - i * kUnit);
          const bool in_place = k.depthwise_in_place && x.chan == 1 && channels == kUnit;
          n = in_place ? std::min(end, d_.c_in / kUnit) - i : 1;
          BasicDepthwiseArgs<T> a;
          if (in_place) {
            a.src = x.p + i * x.unit - g.left1 * x.pix, a.src_pix = x.pix, a.width = g.w, a.left = g.left1;
          } else {
            load_rows(k, x, i, channels, g, lo, hi, t.local);
            a.src = t.local;
          }
          a.kernel = k1, a.stride = s1, a.act = d_.act[0], a.fine = fine_[0];
          a.weight = weight(Stage::start) + static_cast<std::ptrdiff_t>(i) * k1 * k1 * kUnit;
          a.bias = bias(Stage::start) + i * kEpilogue<T>;
          const bool straight = in_place && alone && out.chan == 1;  // to where it belongs
          if (straight) {
            a.dst = out.p + i * out.unit + o0 * out.row, a.dst_pix = out.pix, a.dst_row = out.row;
          } else {
            a.dst = front + i * front_plane;
            a.dst_row = static_cast<std::ptrdiff_t>(g.w1) * kUnit;
          }
          const auto input_row = [&](int y) -> std::ptrdiff_t {
            if (y < 0 || y >= g.h) return -1;
            return in_place ? y * x.row : (y - lo) * pitch1;
          };
          depthwise_pixels(k, a, g.top1, g.w1, n0 * g.w1, front_pixels.lo, front_pixels.hi, input_row, n, x.unit,
                           straight ? out.unit : front_plane);
          for (int u = i; alone && !straight && u < i + n; ++u) {
            const int channels = u + 1 == uo ? n_last : kUnit;
            for (int r = 0; r < rows; ++r) {
              k.store_unit(front + u * front_plane + static_cast<std::ptrdiff_t>(r) * g.w1 * kUnit,
                           out.p + u * out.unit + (o0 + r) * out.row, out.pix, out.chan, g.w1, channels);
            }
          }
        }
      });
    }
    if (start) {
      t.sync();
      if (shared) fetch(front, static_cast<std::ptrdiff_t>(ui) * rows * g.w1 * kUnit);
    } else if (shared && x.pix == kUnit && o0 == y0) {
      for (int i = 0; i < ui; ++i) fetch(x.p + i * x.unit + n0 * x.row, rows * x.row);
    }

    // the product that reads the front or the input
    BasicGemmArgs<T> in;
    if (start) {
      in.a = front, in.a_pix = kUnit, in.a_row = static_cast<std::ptrdiff_t>(g.w1) * kUnit;
      in.a_blk = front_plane;
    } else {
      in.a = x.p + n0 * x.row, in.a_pix = x.pix, in.a_row = x.row, in.a_blk = x.unit;
    }
    if (!start && x.unit == kUnit) {
      in.k_blocks = 1, in.k_len = in.k_last = d_.c_in;
    } else {
      in.k_blocks = ui, in.k_len = kUnit, in.k_last = d_.c_in - (ui - 1) * kUnit;
    }
    in.cols = g.w1;

    BasicGemmArgs<T> to;  // where the last product goes
    to.c = out.p + o0 * out.row, to.c_pix = out.pix, to.c_row = out.row, to.c_unit = out.unit;
    if (d_.residual) to.res = x.p + o0 * x.row, to.r_pix = x.pix, to.r_row = x.row, to.r_unit = x.unit;

    const std::ptrdiff_t middle_plane =
        t.own_pixels ? own.middle_unit : static_cast<std::ptrdiff_t>(o1 - o0) * g.w2 * kUnit;
    for (int c0 = 0; d_.expand && c0 < ue; c0 += p.chunk) {
      const int c1 = std::min(ue, c0 + p.chunk);
      const std::ptrdiff_t b_unit = expand_unit();
      BasicGemmArgs<T> a = in;
      a.b = weight(Stage::expand) + c0 * b_unit, a.b_unit = b_unit;
      a.bias = bias(Stage::expand) + c0 * kEpilogue<T>;
      a.act = d_.act[1], a.fine = fine_[1], a.units = c1 - c0, a.rows = rows;
      const BasicUpcoming<T> down{weight(Stage::project) + static_cast<std::ptrdiff_t>(c0) * kUnit * kUnit,
                                  project_unit(), uo};
      (d_.project ? down : t.after).announce(a, t.own_pixels ? 0 : t.tid, t.n);
      if (!mid) {
        if (d_.project) {
          a.c = middle, a.c_pix = kUnit, a.c_row = static_cast<std::ptrdiff_t>(g.w1) * kUnit, a.c_unit = middle_plane;
        } else {
          a.c = to.c + c0 * to.c_unit, a.c_pix = to.c_pix, a.c_row = to.c_row, a.c_unit = to.c_unit;
          if (to.res != nullptr)
            a.res = to.res + c0 * to.r_unit, a.r_pix = to.r_pix, a.r_row = to.r_row, a.r_unit = to.r_unit;
          if (c1 == ue) a.n_last = n_last;
        }
        if (is_dense) {
          const float* winograd =
              winograd_ > 0 && has_winograd() ? data_.get() + winograd_ + c0 * winograd_unit(d_) : nullptr;
          dense_rows(k, t, x, d_, g, n0, n1, a, winograd);
        } else {
          gemm_split(k, t, a);
        }
      } else {
        // a thread expands its own units and runs the mid depthwise on them: no barrier in between
        T* base = expanded + (p.ring ? static_cast<std::ptrdiff_t>(c0) * plane2 : 0);
        auto slot = [&](int e) { return t.own_pixels ? e - own_rows.lo : (p.ring ? e : e - e0) % p.ring_rows; };
        const Range before = t.pixels(n0 * g.w1, n1 * g.w1), after = t.pixels(o0 * g.w2, o1 * g.w2);
        const int task = std::max(2, std::min(kTask, (c1 - c0) / (4 * t.n) * 2));
        t.share(c1 - c0, task, [&](int first, int end, int next) {
          const Range border = t.own_pixels ? own_rows : Range{n0, n1};
          for (int i = first; i < end; ++i) {
            for (int e = border.lo; e < border.hi; ++e) {
              T* row = base + i * plane2 + slot(e) * pitch2;
              std::memset(row, 0, sizeof(T) * g.left2 * kUnit);
              std::memset(row + (g.left2 + g.w1) * kUnit, 0, sizeof(T) * g.right2 * kUnit);
            }
          }
          // rows of the ring are consecutive but for the wrap
          for (int e = n0; e < n1;) {
            const int n = t.own_pixels ? n1 - e : std::min(n1 - e, p.ring_rows - slot(e));
            BasicGemmArgs<T> s = a;
            s.a += (e - n0) * s.a_row;
            s.rows = n, s.units = end - first;
            if (next >= 0) s.then = s.b + next * b_unit, s.then_unit = b_unit;
            s.b += first * b_unit, s.bias += first * kEpilogue<T>;
            s.c = base + first * plane2 + slot(e) * pitch2 + g.left2 * kUnit;
            s.c_pix = kUnit, s.c_row = pitch2, s.c_unit = plane2;
            s.p_begin = std::max(0, before.lo - e * g.w1), s.p_end = std::min(n * g.w1, before.hi - e * g.w1);
            if (s.p_end > s.p_begin) k.gemm(s);
            e += n;
          }
          if (t.own_pixels) {
            t.meet();
            own.copy_halo(t.tid, end - first, [&](int other) { return base + (other - t.tid) * t.apart; });
          }
          BasicDepthwiseArgs<T> m;
          m.src = base + first * plane2, m.kernel = k2, m.stride = s2, m.act = d_.act[2], m.fine = fine_[2];
          m.weight = weight(Stage::mid) + static_cast<std::ptrdiff_t>(c0 + first) * k2 * k2 * kUnit;
          m.bias = bias(Stage::mid) + (c0 + first) * kEpilogue<T>;
          m.dst = middle + first * middle_plane;
          const auto ring_row = [&](int e) { return e < 0 || e >= g.h1 ? -1 : slot(e) * pitch2; };
          depthwise_pixels(k, m, g.top2, g.w2, o0 * g.w2, after.lo, after.hi, ring_row, end - first, plane2,
                           middle_plane);
        });
      }
      t.sync();
      if (!d_.project) continue;
      if (shared && mid) {
        const Range own = split(c1 - c0, t.n, t.tid);
        fetch(middle, own.lo * middle_plane);
        fetch(middle + own.hi * middle_plane, (c1 - c0 - own.hi) * middle_plane);
      }
      BasicGemmArgs<T> b = to;
      b.a = middle, b.a_pix = kUnit, b.a_row = static_cast<std::ptrdiff_t>(g.w2) * kUnit, b.a_blk = middle_plane;
      b.k_blocks = c1 - c0, b.k_len = kUnit, b.k_last = std::min(kUnit, d_.c_mid - (c1 - 1) * kUnit);
      b.b = weight(Stage::project) + static_cast<std::ptrdiff_t>(c0) * kUnit * kUnit;
      b.b_unit = project_unit();
      b.bias = bias(Stage::project);
      b.units = uo, b.n_last = n_last, b.rows = o1 - o0, b.cols = g.w2;
      b.first_k = c0 == 0, b.last_k = c1 == ue, b.act = d_.act[3], b.fine = fine_[3];
      const int c2 = c1 < ue ? c1 : 0;  // the next chunk, or the first one of the next band
      const BasicUpcoming<T> up{weight(Stage::expand) + c2 * b_unit, b_unit, std::min(ue, c2 + p.chunk) - c2};
      (c1 < ue || o1 < y1 ? up : t.after).announce(b, t.own_pixels ? 0 : t.tid, t.n);
      gemm_split(k, t, b);
      t.sync();
      if (t.own_pixels && mid && c1 < ue) t.meet();  // others may still read the expanded rows of this chunk
    }
    if (!d_.expand && d_.project) {
      BasicGemmArgs<T> b = in;
      b.c = to.c, b.c_pix = to.c_pix, b.c_row = to.c_row, b.c_unit = to.c_unit;
      b.res = to.res, b.r_pix = to.r_pix, b.r_row = to.r_row, b.r_unit = to.r_unit;
      b.b = weight(Stage::project), b.b_unit = project_unit(), b.bias = bias(Stage::project);
      b.units = uo, b.n_last = n_last, b.rows = rows, b.act = d_.act[3], b.fine = fine_[3];
      gemm_split(k, t, b);
      t.sync();
    }
  }
}

// With own pixels a thread reads what it wrote itself, but for the neighbour rows of a depthwise: little goes from core
// to core, and a block needs one barrier inside. With few pixels each thread would read all weights for a short
// product: then units are dealt out. Large images whose expanded rows do not fit are cut into rows; a few of them are
// computed twice.
template <class T>
typename BasicBlock<T>::Share BasicBlock<T>::share_of(const Geometry& g, int threads) const {
  const bool mid = has(Stage::mid), rows = g.h2 >= (mid ? 12 : 2) * threads;
  if (d_.expand_kernel > 1) return rows ? Share::rows : Share::tickets;
  const long long pixels = static_cast<long long>(g.h1) * g.w1;
  if (!mid && rows && pixels >= 196LL * threads) return Share::rows;
  const bool whole = plan(g, g.h2, threads).band >= g.h2;
  if (!whole) return rows ? Share::rows : Share::tickets;
  return (d_.expand || d_.project) && pixels >= static_cast<long long>(kOwnPixels) * threads ? Share::pixels
                                                                                             : Share::tickets;
}

// Channels of the last unit to write. A residual from a tensor with consecutive channels has no padding to read.
template <class T>
int BasicBlock<T>::last_channels(const BasicView<T>& x, bool padded) const {
  const bool whole = padded && !(d_.residual && x.unit == kUnit);
  return whole || d_.c_out % kUnit == 0 ? kUnit : d_.c_out % kUnit;
}

template <class T>
void BasicBlock<T>::run_alone(const BasicKernels<T>& k, const BasicView<T>& x, const BasicView<T>& out, bool padded,
                              int h, int w, int y0, int y1, T* scratch) const {
  const Geometry g = geometry(d_, h, w);
  const Plan p = plan(g, y1 - y0, 1);
  BasicTeam<T> t;
  t.shared = scratch, t.local = scratch + p.shared();
  run_rows(k, t, x, out, last_channels(x, padded), g, y0, y1);
}

template <class T>
std::size_t BasicBlock<T>::rows_floats(int h, int w, int rows) const {
  const Plan p = plan(geometry(d_, h, w), rows, 1);
  return round_line(p.shared() + p.local);
}

template <class T>
bool BasicBlock<T>::run(const BasicRegion<T>& r, const BasicTensor<T>& x, const BasicTensor<T>& out, bool padded, int n,
                        int h, int w) const {
  const Geometry g = geometry(d_, h, w);
  const int n_last = last_channels(x.image, padded);
  auto member = [&](const Plan& p, int tid, int team, T* base) {
    BasicTeam<T> t;
    t.tid = tid, t.n = team, t.barrier = r.barrier;
    t.shared = base;
    t.after = r.after;
    t.draw = r.draw;
    t.local = base + p.shared() + tid * p.local;
    return t;
  };
  // whole images first, one thread each; what is left over is shared
  const int whole = n / r.n * r.n;
  const Plan solo = plan(g, g.h2, 1);
  r.draw->each(whole, [&](int i, int) {
    run_rows(*r.kernels, member(solo, 0, 1, r.scratch(r.tid)), x.at(i), out.at(i), n_last, g, 0, g.h2);
  });
  if (whole == n) return r.n == 1;
  const Share share = share_of(g, r.n);
  if (share == Share::rows) {
    const Range rows = split(g.h2, r.n, r.tid);
    const Plan part = plan(g, rows.hi - rows.lo, 1);
    for (int i = whole; i < n; ++i) {
      run_rows(*r.kernels, member(part, 0, 1, r.scratch(r.tid)), x.at(i), out.at(i), n_last, g, rows.lo, rows.hi);
    }
    return false;
  }
  const Plan team = plan(g, g.h2, r.n);
  if (whole > 0) r.barrier->wait(r.tid, r.n);  // the shared scratch overlaps that of single threads
  BasicTeam<T> t = member(team, r.tid, r.n, r.arena);
  if (share == Share::pixels) {
    t.own_pixels = true, t.shared = r.scratch(r.tid), t.apart = static_cast<std::ptrdiff_t>(r.scratch_floats);
    t.local = t.shared + OwnPixels(d_, g, team, r.n).floats();
    for (int i = whole; i < n; ++i) {
      if (i > whole && has(Stage::mid)) t.meet();  // others may still read the expanded rows of the image before
      run_rows(*r.kernels, t, x.at(i), out.at(i), n_last, g, 0, g.h2);
    }
    return false;
  }
  // run_rows leaves its team synchronized
  for (int i = whole; i < n; ++i) run_rows(*r.kernels, t, x.at(i), out.at(i), n_last, g, 0, g.h2);
  return true;
}

template <class T>
std::size_t BasicBlock<T>::scratch_floats(int h, int w, int threads) const {
  const Geometry g = geometry(d_, h, w);
  auto need = [&](int rows, int team) {
    const Plan p = plan(g, rows, team);
    return round_line((p.shared() + p.local * team + team - 1) / team);
  };
  std::size_t most = need(g.h2, 1);
  if (threads > 1) {
    most = std::max(most, need(g.h2, threads));
    const Share share = share_of(g, threads);
    if (share == Share::pixels) {
      const Plan p = plan(g, g.h2, threads);
      most = std::max(most, round_line(OwnPixels(d_, g, p, threads).floats() + p.local));
    }
    if (share == Share::rows)
      most = std::max(most, std::max(need(g.h2 / threads, 1), need((g.h2 + threads - 1) / threads, 1)));
  }
  return most;
}

#define MNV4_OPS_FOR(T)         \
  template class BasicBlock<T>; \
  template void gemm_split(const BasicKernels<T>&, const BasicTeam<T>&, BasicGemmArgs<T>);
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

}  // namespace mnv4
