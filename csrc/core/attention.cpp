#include "core/attention.h"

#include <algorithm>
#include <limits>

#include "core/parallel.h"
#include "core/tickets.h"

namespace mnv4 {
namespace {

constexpr int kRows = 104;          // eight tall tiles
constexpr int kScores = 24 * 1024;  // floats of the scores of some rows
constexpr double kLog2e = 1.4426950408889634074;

}  // namespace

int attention_rows(int nk, int rows) {
  const int most = std::clamp(kScores / (units_of(nk) * kUnit), 4, kRows);
  const int parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

void pack_keys(const KernelTable& k, const float* src, std::ptrdiff_t pix, std::ptrdiff_t chan, int unit, int nk,
               int key_dim, float* keys) {
  const int channels = std::min(kUnit, key_dim - unit * kUnit);
  for (int u = 0; u < units_of(nk); ++u) {
    float* dst = keys + (static_cast<std::ptrdiff_t>(u) * key_dim + unit * kUnit) * kUnit;
    k.load_unit(src + u * kUnit * pix, chan, pix, channels, std::min(kUnit, nk - u * kUnit), dst);
  }
  if (unit > 0) return;
  float* beyond = keys + static_cast<std::ptrdiff_t>(units_of(nk)) * kUnit * key_dim;
  for (int i = 0; i < units_of(nk) * kUnit; ++i) beyond[i] = i < nk ? 0.0f : -std::numeric_limits<float>::infinity();
}

void attend(const KernelTable& k, const Heads& h, const View& q, const View& o, int rows, float* scores) {
  const int units = units_of(h.nk), depth = units_of(h.key_dim);
  const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(rows) * kUnit;
  float* inverse = scores + units * plane;
  GemmArgs s;
  s.a = q.p, s.a_pix = q.pix, s.a_blk = q.unit;
  s.k_blocks = depth, s.k_len = kUnit, s.k_last = h.key_dim - (depth - 1) * kUnit;
  s.b = h.keys, s.b_unit = static_cast<std::ptrdiff_t>(h.key_dim) * kUnit;
  s.bias = h.keys + units * s.b_unit;
  s.c = scores, s.c_pix = kUnit, s.c_unit = plane;
  s.rows = 1, s.cols = rows, s.units = units;
  k.gemm(s);

  SoftmaxArgs e;
  e.s = scores, e.unit = plane, e.rows = rows, e.units = units, e.inverse = inverse;
  k.softmax(e);

  GemmArgs p;
  p.a = scores, p.a_pix = kUnit, p.a_blk = plane;
  p.k_blocks = units, p.k_len = kUnit, p.k_last = h.nk - (units - 1) * kUnit;
  p.b = h.values, p.b_unit = static_cast<std::ptrdiff_t>(h.nk) * kUnit;
  p.c = o.p, p.c_pix = o.pix, p.c_unit = o.unit;
  p.rows = 1, p.cols = rows, p.units = units_of(h.value_dim);
  k.gemm(p);
  k.scale_rows(o.p, o.pix, o.unit, p.units, rows, inverse);
}

std::size_t AttentionCall::scratch_floats() const {
  const int rows = attention_rows(nk, nq);
  const std::size_t wide = static_cast<std::size_t>(std::max(units_of(key_dim), units_of(value_dim))) * kUnit;
  return round_line(key_floats(nk, key_dim) + value_floats(nk, value_dim) + score_floats(nk, rows) + wide * rows);
}

namespace {

struct Job {
  const AttentionCall* call;
  const KernelTable* kernels;
  float* arena;
};

// Each thread takes a run of (image, head, part of the rows) and packs the keys and values of the images it meets: some
// are packed twice, and nobody waits.
void body(void* ctx, int tid, int threads) {
  const Job& job = *static_cast<Job*>(ctx);
  const AttentionCall& c = *job.call;
  const KernelTable& k = *job.kernels;
  const int rows = attention_rows(c.nk, c.nq), parts = (c.nq + rows - 1) / rows, each = c.heads * parts;
  float* keys = job.arena + tid * c.scratch_floats();
  float* values = keys + key_floats(c.nk, c.key_dim);
  float* scores = values + value_floats(c.nk, c.value_dim);
  float* q = scores + score_floats(c.nk, rows);
  const Heads heads{keys, values, c.nk, c.key_dim, c.value_dim};
  const float scale = static_cast<float>(c.scale * kLog2e);
  // rows that lie as the products take them are read and written where they are
  const bool q_near = c.q.element == 1, out_near = c.out.element == 1 && c.value_dim % kUnit == 0;
  int image = -1;
  const Range own = split(c.n * each, threads, tid);
  for (int i = own.lo; i < own.hi; ++i) {
    if (i / each != image) {
      image = i / each;
      const float* from = c.k.p + image * c.k.image;
      for (int u = 0; u < units_of(c.key_dim); ++u)
        pack_keys(k, from + u * kUnit * c.k.element, c.k.row, c.k.element, u, c.nk, c.key_dim, keys);
      const std::ptrdiff_t floats = static_cast<std::ptrdiff_t>(units_of(c.nk)) * kUnit * c.key_dim;
      for (std::ptrdiff_t j = 0; j < floats; ++j) keys[j] *= scale;
      from = c.v.p + image * c.v.image;
      for (int u = 0; u < units_of(c.value_dim); ++u) {
        k.load_unit(from + u * kUnit * c.v.element, c.v.row, c.v.element, c.nk,
                    std::min(kUnit, c.value_dim - u * kUnit), values + static_cast<std::ptrdiff_t>(u) * c.nk * kUnit);
      }
    }
    const int head = i % each / parts, first = i % parts * rows, n = std::min(rows, c.nq - first);
    const std::ptrdiff_t plane = static_cast<std::ptrdiff_t>(n) * kUnit;
    float* from = c.q.p + image * c.q.image + head * c.q.head + first * c.q.row;
    float* to = c.out.p + image * c.out.image + head * c.out.head + first * c.out.row;
    if (!q_near) {
      for (int u = 0; u < units_of(c.key_dim); ++u) {
        k.load_unit(from + u * kUnit * c.q.element, c.q.row, c.q.element, n, std::min(kUnit, c.key_dim - u * kUnit),
                    q + u * plane);
      }
    }
    const View copied{.p = q, .unit = plane, .pix = kUnit};
    attend(k, heads, q_near ? View{.p = from, .unit = kUnit, .pix = c.q.row} : copied,
           out_near ? View{.p = to, .unit = kUnit, .pix = c.out.row} : copied, n, scores);
    if (out_near) continue;
    for (int u = 0; u < units_of(c.value_dim); ++u) {
      k.store_unit(q + u * plane, to + u * kUnit * c.out.element, c.out.row, c.out.element, n,
                   std::min(kUnit, c.value_dim - u * kUnit));
    }
  }
}

}  // namespace

void AttentionCall::run(const KernelTable& kernels, float* arena, int threads) const {
  Job job{this, &kernels, arena};
  parallel_run(threads, body, &job);
}

}  // namespace mnv4
