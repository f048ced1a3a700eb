#include "core/program.h"

#include <algorithm>
#include <chrono>

namespace mnv4 {
namespace {

const Block* block(const Op& op) {
  const Block* const* b = std::get_if<const Block*>(&op);
  return b != nullptr ? *b : nullptr;
}

const Head* head(const Op& op) {
  const Head* const* p = std::get_if<const Head*>(&op);
  return p != nullptr ? *p : nullptr;
}

int inputs(const Op& op) { return block(op) != nullptr ? block(op)->desc().c_in : head(op)->desc().c_in; }

// canonical channels_last
Tensor image_tensor(float* p, int channels, const Geometry& g) {
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(g.w2) * channels;
  return strided_tensor(p, row * g.h2, 1, row, channels);
}

Pair pair_at(const std::vector<Op>& ops, std::size_t i, int h, int w) {
  if (i + 1 >= ops.size() || block(ops[i]) == nullptr || block(ops[i + 1]) == nullptr) return {};
  return plan_pair(*block(ops[i]), *block(ops[i + 1]), h, w);
}

struct Call {
  const std::vector<Op>* ops;
  const KernelTable* kernels;
  Tensor x;
  int n, h, w;
  float *out, *workspace, *arena;
  std::size_t scratch;
  double* seconds;
  std::atomic<int> tickets{0};
  Barrier barrier{0};
};

using Clock = std::chrono::steady_clock;

void body(void* ctx, int tid, int threads) {
  Call& c = *static_cast<Call*>(ctx);
  const std::vector<Op>& ops = *c.ops;
  Region r;
  r.kernels = c.kernels, r.barrier = &c.barrier, r.arena = c.arena, r.scratch_floats = c.scratch, r.tid = tid,
  r.n = threads;
  r.tickets = &c.tickets;
  float* half[2] = {c.workspace, c.workspace + workspace_floats(ops, c.n, c.h, c.w) / 2};
  Tensor x = c.x;
  int h = c.h, w = c.w;
  auto t0 = Clock::now();
  auto lap = [&](std::size_t i) {
    if (c.seconds == nullptr || tid != 0) return;
    const auto t = Clock::now();
    c.seconds[i] = std::chrono::duration<double>(t - t0).count();
    t0 = t;
  };
  for (std::size_t i = 0; i < ops.size(); ++i) {
    if (const Head* last = head(ops[i])) {
      last->run(r, x, c.out, c.n, h, w);
      lap(i);
      return;
    }
    const Pair pair = pair_at(ops, i, h, w);
    const std::size_t following = i + (pair.band > 0 ? 2 : 1);
    r.after =
        following < ops.size() && block(ops[following]) != nullptr ? block(ops[following])->upcoming() : Upcoming{};
    if (pair.band > 0) {
      const Geometry first = geometry(block(ops[i])->desc(), h, w);
      const BlockDesc& d = block(ops[i + 1])->desc();
      const Geometry g = geometry(d, first.h2, first.w2);
      const bool last = i + 2 == ops.size();
      run_pair(pair, r, *block(ops[i]), *block(ops[i + 1]), x,
               last ? image_tensor(c.out, d.c_out, g) : blocked_tensor(half[(i + 1) % 2], d.c_out, g.h2, g.w2), !last,
               c.n, h, w);
      if (threads > 1) c.barrier.wait(tid, threads);
      lap(i);
      x = blocked_tensor(half[(i + 1) % 2], d.c_out, g.h2, g.w2);
      h = g.h2, w = g.w2;
      ++i;
      continue;
    }
    const Block& b = *block(ops[i]);
    const Geometry g = geometry(b.desc(), h, w);
    const int channels = b.desc().c_out;
    const bool last = i + 1 == ops.size();
    const Tensor to = last ? image_tensor(c.out, channels, g) : blocked_tensor(half[i % 2], channels, g.h2, g.w2);
    if (!b.run(r, x, to, !last, c.n, h, w)) c.barrier.wait(tid, threads);
    lap(i);
    x = to, h = g.h2, w = g.w2;
  }
}

}  // namespace

std::string check(const std::vector<Op>& ops) {
  if (ops.empty()) return "ops is empty, expected at least one Block or Head";
  int channels = inputs(ops[0]);
  for (std::size_t i = 0; i < ops.size(); ++i) {
    if (inputs(ops[i]) != channels) {
      return "ops[" + std::to_string(i) + "] takes " + std::to_string(inputs(ops[i])) + " channels, expected the " +
             std::to_string(channels) + " that come before it";
    }
    if (const Block* b = block(ops[i])) {
      channels = b->desc().c_out;
    } else if (i + 1 != ops.size()) {
      return "ops[" + std::to_string(i) + "] is a Head, expected it last";
    }
  }
  return {};
}

Shape output_shape(const std::vector<Op>& ops, int n, int h, int w) {
  Shape s{n, 0, h, w};
  for (const Op& op : ops) {
    if (const Head* last = head(op)) return {n, last->features(), 0, 0};
    const Geometry g = geometry(block(op)->desc(), s.h, s.w);
    s = {n, block(op)->desc().c_out, g.h2, g.w2};
  }
  return s;
}

std::size_t workspace_floats(const std::vector<Op>& ops, int n, int h, int w) {
  std::size_t most = 0;
  for (std::size_t i = 0; i + 1 < ops.size(); ++i) {
    const Block* b = block(ops[i]);
    const Geometry g = geometry(b->desc(), h, w);
    const bool inside = pair_at(ops, i, h, w).band > 0;  // the image between a pair is never whole
    if (!inside) most = std::max(most, static_cast<std::size_t>(n) * units_of(b->desc().c_out) * kUnit * g.h2 * g.w2);
    h = g.h2, w = g.w2;
  }
  return 2 * most;
}

std::size_t scratch_floats(const std::vector<Op>& ops, int h, int w, int threads) {
  std::size_t most = 0;
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const Op& op = ops[i];
    // a region may get fewer threads than asked for
    for (int t = 1; t <= threads; ++t) {
      const std::size_t need =
          block(op) != nullptr ? block(op)->scratch_floats(h, w, t) : head(op)->scratch_floats(h, w, t);
      most = std::max(most, (need * t + threads - 1) / threads);
      if (t == 1) most = std::max(most, need);
    }
    most = std::max(most, pair_at(ops, i, h, w).scratch);
    if (const Block* b = block(op)) {
      const Geometry g = geometry(b->desc(), h, w);
      h = g.h2, w = g.w2;
    }
  }
  return (most + 15) / 16 * 16;
}

void run(const std::vector<Op>& ops, const KernelTable& kernels, const Tensor& x, int n, int h, int w, float* out,
         float* workspace, float* arena, std::size_t scratch, int threads, double* seconds) {
  Call c;
  c.seconds = seconds;
  c.ops = &ops, c.kernels = &kernels, c.x = x, c.n = n, c.h = h, c.w = w;
  c.out = out, c.workspace = workspace, c.arena = arena, c.scratch = scratch;
  parallel_run(threads, body, &c);
}

}  // namespace mnv4
