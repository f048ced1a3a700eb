#include "core/mqa.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/attention.h"
#include "core/cpu_features.h"
#include "core/rows.h"

namespace mnv4 {
namespace {

constexpr int kOwnQueries = 64;  // queries of a thread from which on it is worth reading all weights for them
constexpr int kPair = 2;         // units of keys or values that a thread makes at a time

BlockDesc down_of(const MqaDesc& d) {
  BlockDesc b;
  b.c_in = b.c_mid = b.c_out = d.c;
  b.start_kernel = d.kv_kernel, b.start_stride = d.kv_stride, b.same_padding = d.same_padding;
  return b;
}

// Average of the pixels of x below each query, window of 2 x 2 cut off at the border.
void pool(const View& x, int u, int channels, const MqaGeometry& g, float* dst) {
  for (int y = 0; y < g.hq; ++y) {
    for (int c = 0; c < g.wq; ++c, dst += kUnit) {
      const int y1 = std::min(g.h, 2 * y + 2), x1 = std::min(g.w, 2 * c + 2);
      const float count = static_cast<float>((y1 - 2 * y) * (x1 - 2 * c));
      float sum[kUnit] = {};
      for (int yy = 2 * y; yy < y1; ++yy) {
        for (int xx = 2 * c; xx < x1; ++xx) {
          const float* p = x.p + u * x.unit + yy * x.row + xx * x.pix;
          for (int i = 0; i < channels; ++i) sum[i] += p[i * x.chan];
        }
      }
      for (int i = 0; i < kUnit; ++i) dst[i] = sum[i] / count;
    }
  }
}

// Source of a pixel that is made between two: bilinear, scale 2, corners not aligned.
struct Between {
  int lo, hi;
  float part;  // of hi
};
Between between(int to, int n) {
  const float at = std::max(0.0f, (static_cast<float>(to) + 0.5f) * 0.5f - 0.5f);
  const int lo = static_cast<int>(at);
  return {lo, lo + 1 < n ? lo + 1 : lo, at - static_cast<float>(lo)};
}

void upsample(const float* src, const View& x, const View& out, int u, int channels, bool residual,
              const MqaGeometry& g) {
  for (int y = 0; y < g.ho; ++y) {
    const Between v = between(y, g.hq);
    for (int c = 0; c < g.wo; ++c) {
      const Between s = between(c, g.wq);
      const float *a = src + (v.lo * g.wq + s.lo) * kUnit, *b = src + (v.lo * g.wq + s.hi) * kUnit,
                  *d = src + (v.hi * g.wq + s.lo) * kUnit, *e = src + (v.hi * g.wq + s.hi) * kUnit;
      const float* res = x.p + u * x.unit + y * x.row + c * x.pix;
      float* to = out.p + u * out.unit + y * out.row + c * out.pix;
      for (int i = 0; i < channels; ++i) {
        const float top = (1.0f - s.part) * a[i] + s.part * b[i], low = (1.0f - s.part) * d[i] + s.part * e[i];
        const float value = (1.0f - v.part) * top + v.part * low;
        to[i * out.chan] = residual ? value + res[i * x.chan] : value;
      }
    }
  }
}

}  // namespace

// Where things lie in a team's scratch, in floats. A thread of a team that keeps its own queries takes them a strip at
// a time; otherwise all queries are one strip that the threads share.
struct MqaBlock::Plan {
  bool own = true;       // each thread keeps its own queries
  int strip = 0;         // queries of a strip
  int part = 0;          // queries whose scores are made together
  std::size_t down = 0;  // of each depthwise output
  std::size_t keys = 0, values = 0;
  std::size_t pooled = 0, low = 0;  // queries before their projection; output before the up-sampling
  std::size_t query = 0,
              heads = 0;  // of a strip; heads: 0 where the output of the attention takes the place of the queries
  std::size_t local = 0;  // of each thread
  std::size_t strips() const { return query + heads; }
  std::size_t shared() const { return 2 * down + keys + values + pooled + low + (own ? 0 : strips()); }
  std::size_t all(int team) const { return shared() + team * local; }
};

MqaGeometry geometry(const MqaDesc& d, int h, int w) {
  MqaGeometry g;
  const int q = d.query_stride, up = d.same_padding ? q - 1 : 0;
  g.h = h, g.w = w;
  g.hq = (h + up) / q, g.wq = (w + up) / q;
  g.ho = g.hq * q, g.wo = g.wq * q;
  g.hk = h, g.wk = w;
  if (d.kv_stride > 1) {
    g.down = geometry(down_of(d), h, w);
    g.hk = g.down.h1, g.wk = g.down.w1;
  }
  return g;
}

std::string MqaBlock::refuses(int h, int w) const {
  const MqaGeometry g = geometry(d_, h, w);
  if (g.nq() == 0) return "at least as many rows and columns as query_stride";
  if (d_.residual && (g.ho != h || g.wo != w)) return "rows and columns divisible by query_stride, with a residual";
  return {};
}

MqaBlock::Plan MqaBlock::plan(const MqaGeometry& g, int team) const {
  Plan p;
  const std::size_t units = units_of(d_.c), nk = g.nk(), nq = g.nq();
  const std::size_t wide_q = static_cast<std::size_t>(d_.heads) * key_units() * kUnit,
                    wide_o = static_cast<std::size_t>(d_.heads) * value_units() * kUnit;
  p.own = team == 1 || g.nq() >= kOwnQueries * team;
  const int queries = p.own ? (g.nq() + team - 1) / team : g.nq();
  // queries and outputs of a strip, beside the weights of both products
  const std::size_t room = cpu_info().l2 / sizeof(float) / 2;
  const int most = std::max<int>(13, static_cast<int>(room / (wide_q + (wide_q == wide_o ? 0 : wide_o))));
  const int strips = p.own ? (queries + most - 1) / most : 1;
  p.strip = (queries + strips - 1) / strips;
  p.part = attention_rows(g.nk(), p.own ? p.strip : std::max(1, (p.strip + 1) / 2));
  if (d_.kv_stride > 1) p.down = units * kUnit * nk;
  p.keys = key_floats(g.nk(), d_.key_dim), p.values = value_floats(g.nk(), d_.value_dim);
  if (d_.query_stride > 1) p.pooled = units * kUnit * nq, p.low = units * kUnit * nq;
  p.query = wide_q * p.strip;
  p.heads = key_units() == value_units() ? 0 : wide_o * p.strip;
  std::size_t row = static_cast<std::size_t>(kPair) * kUnit * nk;  // keys before they are packed
  if (d_.kv_stride > 1) {
    const Geometry& e = g.down;
    row = std::max(
        row, (static_cast<std::size_t>(e.left1) + e.w + e.right1) * kUnit * ((e.h1 - 1) * d_.kv_stride + d_.kv_kernel));
  }
  p.local = std::max(round_line(row), (p.own ? p.strips() : 0) + score_floats(g.nk(), p.part));
  return p;
}

// Keys and values of an image, packed for the attention; ends with the threads together.
void MqaBlock::keys_and_values(const KernelTable& k, const Team& t, const View& x, const MqaGeometry& g,
                               const Plan& p) const {
  const int units = units_of(d_.c), nk = g.nk();
  float *key_down = t.shared, *value_down = key_down + p.down, *keys = value_down + p.down, *values = keys + p.keys;
  const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(nk) * kUnit;
  if (d_.kv_stride > 1) {
    const Geometry& e = g.down;
    const std::ptrdiff_t pitch = static_cast<std::ptrdiff_t>(e.left1 + e.w + e.right1) * kUnit;
    const int lo = -e.top1, hi = (e.h1 - 1) * d_.kv_stride - e.top1 + d_.kv_kernel, taps = d_.kv_kernel * d_.kv_kernel;
    t.share(units, 1, [&](int first, int end, int) {
      for (int u = first; u < end; ++u) {
        // the norm comes before the zero padding, which stays zero
        load_rows(k, x, u, std::min(kUnit, d_.c - u * kUnit), e, lo, hi, t.local,
                  d_.norm ? weight(MqaStage::norm) + u * kUnit : nullptr, bias(MqaStage::norm) + u * kUnit);
        for (const MqaStage s : {MqaStage::key_down, MqaStage::value_down}) {
          DepthwiseArgs a;
          a.src = t.local, a.kernel = d_.kv_kernel, a.stride = d_.kv_stride;
          a.weight = weight(s) + static_cast<std::ptrdiff_t>(u) * taps * kUnit;
          a.bias = bias(s) + u * kUnit;
          a.dst = (s == MqaStage::key_down ? key_down : value_down) + u * plane;
          depthwise_pixels(k, a, e.top1, e.w1, 0, 0, nk,
                           [&](int y) { return y < 0 || y >= e.h ? -1 : (y - lo) * pitch; });
        }
      }
    });
    t.meet();
  }

  const int key_tasks = (key_units() + kPair - 1) / kPair, value_tasks = (value_units() + kPair - 1) / kPair;
  const bool pads = d_.value_dim % kUnit != 0;
  t.share(key_tasks + value_tasks, 1, [&](int first, int end, int) {
    for (int i = first; i < end; ++i) {
      const bool key = i < key_tasks;
      const MqaStage s = key ? MqaStage::key : MqaStage::value;
      const int u = (key ? i : i - key_tasks) * kPair, all = key ? key_units() : value_units();
      GemmArgs a;
      if (d_.kv_stride > 1) {
        a.a = key ? key_down : value_down, a.a_pix = kUnit, a.a_row = g.wk * kUnit, a.a_blk = plane;
      } else {
        a.a = x.p, a.a_pix = x.pix, a.a_row = x.row, a.a_blk = x.unit;
      }
      if (a.a_blk == kUnit) {
        a.k_blocks = 1, a.k_len = a.k_last = d_.c;
      } else {
        a.k_blocks = units, a.k_len = kUnit, a.k_last = d_.c - (units - 1) * kUnit;
      }
      a.b_unit = static_cast<std::ptrdiff_t>(d_.c) * kUnit;
      a.b = weight(s) + u * a.b_unit, a.bias = bias(s) + u * kUnit;
      a.units = std::min(kPair, all - u), a.rows = g.hk, a.cols = g.wk;
      a.c = key ? t.local : values + u * plane;
      a.c_pix = kUnit, a.c_row = g.wk * kUnit, a.c_unit = plane;
      if (!key && pads && u + a.units == all) {
        // channels beyond the last one must not become NaN where the input is not finite
        a.n_last = d_.value_dim % kUnit;
        std::memset(values + (all - 1) * plane, 0, sizeof(float) * plane);
      }
      k.gemm(a);
      for (int j = 0; key && j < a.units; ++j) pack_keys(k, t.local + j * plane, kUnit, 1, u + j, nk, d_.key_dim, keys);
    }
  });
  t.meet();
}

// The output before its up-sampling, to the tensor.
void MqaBlock::finish(const KernelTable&, const Team& t, const View& x, const View& out, int n_last,
                      const MqaGeometry& g, const Plan& p) const {
  const float* low = t.shared + 2 * p.down + p.keys + p.values + p.pooled;
  const int units = units_of(d_.c);
  t.meet();
  const Range own = split(units, t.n, t.tid);
  for (int u = own.lo; u < own.hi; ++u) {
    upsample(low + static_cast<std::ptrdiff_t>(u) * g.nq() * kUnit, x, out, u, u + 1 == units ? n_last : kUnit,
             d_.residual, g);
  }
}

void MqaBlock::run_image(const KernelTable& k, const Team& t, const View& x, const View& out, int n_last,
                         const MqaGeometry& g) const {
  const Plan p = plan(g, t.n);
  const int units = units_of(d_.c), nq = g.nq(), heads = d_.heads;
  float* keys = t.shared + 2 * p.down;
  float *pooled = keys + p.keys + p.values, *low = pooled + p.pooled;
  const Heads shared{keys, keys + p.keys, g.nk(), d_.key_dim, d_.value_dim};
  View from = x, to = out;
  if (d_.query_stride > 1) {
    const Range own = split(units, t.n, t.tid);
    for (int u = own.lo; u < own.hi; ++u)
      pool(x, u, std::min(kUnit, d_.c - u * kUnit), g, pooled + static_cast<std::ptrdiff_t>(u) * nq * kUnit);
    from = blocked_tensor(pooled, d_.c, g.hq, g.wq).image, to = blocked_tensor(low, d_.c, g.hq, g.wq).image;
  }
  keys_and_values(k, t, x, g, p);

  float* queries = p.own ? t.local : low + p.low;
  float* outputs = p.heads > 0 ? queries + p.query : queries;
  float* scores = p.own ? t.local + p.strips() : t.local;
  GemmArgs q;
  q.a = from.p, q.a_pix = from.pix, q.a_row = from.row, q.a_blk = from.unit;
  if (from.unit == kUnit) {
    q.k_blocks = 1, q.k_len = q.k_last = d_.c;
  } else {
    q.k_blocks = units, q.k_len = kUnit, q.k_last = d_.c - (units - 1) * kUnit;
  }
  q.b = weight(MqaStage::query), q.b_unit = static_cast<std::ptrdiff_t>(d_.c) * kUnit, q.bias = bias(MqaStage::query);
  q.units = heads * key_units(), q.rows = g.hq, q.cols = g.wq;
  q.c_pix = kUnit, q.c_row = g.wq * kUnit;
  GemmArgs o;
  const int depth = heads * value_units();
  o.a_pix = kUnit, o.a_row = g.wq * kUnit;
  o.k_blocks = depth, o.k_len = kUnit, o.k_last = heads == 1 ? d_.value_dim - (depth - 1) * kUnit : kUnit;
  o.b = weight(MqaStage::output), o.bias = bias(MqaStage::output);
  o.b_unit = (static_cast<std::ptrdiff_t>(depth - 1) * kUnit + o.k_last) * kUnit;
  o.c = to.p, o.c_pix = to.pix, o.c_row = to.row, o.c_unit = to.unit;
  if (d_.residual && d_.query_stride == 1) o.res = x.p, o.r_pix = x.pix, o.r_row = x.row, o.r_unit = x.unit;
  o.units = units, o.n_last = d_.query_stride == 1 ? n_last : kUnit, o.rows = g.hq, o.cols = g.wq;

  if (p.own) {
    const Range own = split(nq, t.n, t.tid);
    for (int first = own.lo; first < own.hi; first += p.strip) {
      const int count = std::min(p.strip, own.hi - first);
      const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(count) * kUnit, before = first * kUnit;
      q.c = queries - before, q.c_unit = plane, q.p_begin = first, q.p_end = first + count;
      o.a = outputs - before, o.a_blk = plane, o.p_begin = first, o.p_end = first + count;
      k.gemm(q);
      for (int at = 0; at < count; at += p.part) {
        for (int i = 0; i < heads; ++i) {
          attend(k, shared, {.p = queries + i * key_units() * plane + at * kUnit, .unit = plane, .pix = kUnit},
                 {.p = outputs + i * value_units() * plane + at * kUnit, .unit = plane, .pix = kUnit},
                 std::min(p.part, count - at), scores);
        }
      }
      t.after.announce(o, 0, t.n);
      k.gemm(o);
    }
  } else {
    const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(nq) * kUnit;
    q.c = queries, q.c_unit = plane;
    gemm_split(k, t, q);
    t.meet();
    const int parts = (nq + p.part - 1) / p.part;
    t.share(heads * parts, 1, [&](int first, int end, int) {
      for (int i = first; i < end; ++i) {
        const int head = i / parts, at = i % parts * p.part;
        attend(k, shared, {.p = queries + head * key_units() * plane + at * kUnit, .unit = plane, .pix = kUnit},
               {.p = outputs + head * value_units() * plane + at * kUnit, .unit = plane, .pix = kUnit},
               std::min(p.part, nq - at), scores);
      }
    });
    t.meet();
    o.a = outputs, o.a_blk = plane;
    t.after.announce(o, t.tid, t.n);
    gemm_split(k, t, o);
  }
  if (d_.query_stride > 1) finish(k, t, x, out, n_last, g, p);
}

namespace {

// Units of an image to fp32.
template <class T>
void widen(const BasicView<T>& x, const Range& units, int channels, int h, int w, const View& to) {
  for (int u = units.lo; u < units.hi; ++u) {
    const int n = std::min(kUnit, channels - u * kUnit);
    for (int i = 0; i < h * w; ++i) {
      const T* from = x.p + u * x.unit + i / w * x.row + i % w * x.pix;
      float* p = to.p + u * to.unit + i * kUnit;
      for (int c = 0; c < n; ++c) p[c] = from[c * x.chan];
    }
  }
}

// And back.
template <class T>
void narrow(const View& x, const Range& units, int channels, int h, int w, const BasicView<T>& to) {
  for (int u = units.lo; u < units.hi; ++u) {
    const int n = std::min(kUnit, channels - u * kUnit);
    for (int i = 0; i < h * w; ++i) {
      const float* from = x.p + u * x.unit + i * kUnit;
      T* p = to.p + u * to.unit + i / w * to.row + i % w * to.pix;
      for (int c = 0; c < n; ++c) p[c * to.chan] = static_cast<T>(from[c]);
    }
  }
}

}  // namespace

template <class T>
std::size_t BasicMqa<T>::copied(const MqaGeometry& g) const {
  if (std::is_same_v<T, float>) return 0;
  return static_cast<std::size_t>(units_of(d_.c)) * kUnit * (g.h * g.w + g.ho * g.wo);
}

template <class T>
bool BasicMqa<T>::run(const BasicRegion<T>& r, const BasicTensor<T>& x, const BasicTensor<T>& out, bool padded, int n,
                      int h, int w) const {
  const MqaGeometry g = geometry(d_, h, w);
  // a residual from a tensor with consecutive channels has no padding to read
  const bool full = (padded && !(d_.residual && x.image.unit == kUnit)) || d_.c % kUnit == 0;
  const int n_last = full ? kUnit : d_.c % kUnit;
  const KernelTable& k = *kernels_for<float>();
  const std::size_t copies = copied(g);
  Team t;
  t.barrier = r.barrier, t.draw = r.draw;
  float* base = nullptr;
  auto image = [&](int i) {
    if constexpr (std::is_same_v<T, float>) {
      t.after = r.after;
      run_image(*r.kernels, t, x.at(i), out.at(i), n_last, g);
    } else {
      const View in = blocked_tensor(base, d_.c, g.h, g.w).image;
      const View made =
          blocked_tensor(base + static_cast<std::size_t>(units_of(d_.c)) * kUnit * g.h * g.w, d_.c, g.ho, g.wo).image;
      const Range own = split(units_of(d_.c), t.n, t.tid);
      widen(x.at(i), own, d_.c, g.h, g.w, in);
      t.meet();
      run_image(k, t, in, made, kUnit, g);
      t.meet();
      narrow(made, own, d_.c, g.ho, g.wo, out.at(i));
    }
  };
  const int whole = n / r.n * r.n;
  const Plan solo = plan(g, 1);
  base = reinterpret_cast<float*>(r.scratch(r.tid));
  t.shared = base + copies, t.local = t.shared + solo.shared();
  r.draw->each(whole, [&](int i, int) { image(i); });
  if (whole == n) return r.n == 1;
  if (whole > 0) r.barrier->wait(r.tid, r.n);
  const Plan team = plan(g, r.n);
  base = reinterpret_cast<float*>(r.arena);
  t.tid = r.tid, t.n = r.n, t.shared = base + copies, t.local = t.shared + team.shared() + r.tid * team.local;
  for (int i = whole; i < n; ++i) {
    if (i > whole) t.meet();  // others may still read what the image before has left
    image(i);
  }
  return false;
}

template <class T>
std::size_t BasicMqa<T>::scratch_floats(int h, int w, int threads) const {
  const MqaGeometry g = geometry(d_, h, w);
  const std::size_t copies = copied(g), one = round_line(copies + plan(g, 1).all(1));
  const std::size_t all = round_line((copies + plan(g, threads).all(threads) + threads - 1) / threads);
  return std::max(one, all) * sizeof(float) / sizeof(T);
}

template <class T>
BasicUpcoming<T> BasicMqa<T>::upcoming() const {
  if constexpr (std::is_same_v<T, float>) {
    return {weight(MqaStage::query), static_cast<std::ptrdiff_t>(d_.c) * kUnit, d_.heads * key_units()};
  } else {
    return {};
  }
}

#define MNV4_OPS_FOR(T) template class BasicMqa<T>;
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

}  // namespace mnv4
