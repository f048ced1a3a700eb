#include "core/program.h"

#include <algorithm>
#include <chrono>

#include "core/cpu_features.h"

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

const Mqa* attention(const Op& op) {
  const Mqa* const* m = std::get_if<const Mqa*>(&op);
  return m != nullptr ? *m : nullptr;
}

// of an operation that gives images
int outputs(const Op& op) { return block(op) != nullptr ? block(op)->desc().c_out : attention(op)->desc().c; }

struct Size {
  int h, w;
};
Size size_after(const Op& op, int h, int w) {
  if (const Block* b = block(op)) {
    const Geometry g = geometry(b->desc(), h, w);
    return {g.h2, g.w2};
  }
  const MqaGeometry g = geometry(attention(op)->desc(), h, w);
  return {g.ho, g.wo};
}

Upcoming upcoming(const std::vector<Op>& ops, std::size_t i) {
  if (i >= ops.size()) return {};
  if (const Block* b = block(ops[i])) return b->upcoming();
  if (const Mqa* m = attention(ops[i])) return m->upcoming();
  return {};
}

// canonical channels_last
Tensor image_tensor(float* p, int channels, int h, int w) {
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(w) * channels;
  return strided_tensor(p, row * h, 1, row, channels);
}

Pair pair_at(const std::vector<Op>& ops, std::size_t i, int h, int w) {
  if (i + 1 >= ops.size() || block(ops[i]) == nullptr || block(ops[i + 1]) == nullptr) return {};
  return plan_pair(*block(ops[i]), *block(ops[i + 1]), h, w);
}

// scratch of a thread begins and ends with a page, where the prefetchers of its core stop
constexpr std::size_t kPage = 4096 / sizeof(float);
std::size_t pages(std::size_t floats) { return (floats + kPage - 1) / kPage * kPage; }

struct Call {
  const std::vector<Op>* ops;
  const ProgramPlan* plan;
  const KernelTable* kernels;
  Tensor x;
  float *out, *workspace, *arena;
  double* seconds;
  Tickets tickets;
  Barrier barrier{0};
};

using Clock = std::chrono::steady_clock;

// What a thread walks through a list.
class Walk {
 public:
  Walk(const Call& c, const Region& r) : c_(c), r_(r), lap_(Clock::now()) {}

  struct State {
    Tensor x;
    int h, w;
    int half;  // where x lies, if in a half
  };

  /// Operations [from, to) on a batch; what lies between them alternates between the two halves, the last one writes
  /// `final`.
  State run(std::size_t from, std::size_t to, State s, int n, float* const half[2], const Tensor& final, bool padded,
            const Region& r) {
    const std::vector<Op>& ops = *c_.ops;
    for (std::size_t i = from; i < to; ++i) {
      if (const Head* last = head(ops[i])) {
        last->run(r, s.x, c_.out, n, s.h, s.w);
        lap(i);
        return s;
      }
      const Pair& pair = c_.plan->pairs[i];
      const std::size_t first = i;
      if (pair.band > 0) ++i;
      Region here = r;
      here.after = upcoming(ops, i + 1);
      Size g = size_after(ops[first], s.h, s.w);
      if (i > first) g = size_after(ops[i], g.h, g.w);
      const bool end = i + 1 == to;
      const int other = 1 - s.half;
      const Tensor out = end ? final : blocked_tensor(half[other], outputs(ops[i]), g.h, g.w);
      bool together = false;
      if (const Mqa* m = attention(ops[i])) {
        together = m->run(here, s.x, out, !end || padded, n, s.h, s.w);
      } else if (i > first) {
        run_pair(pair, here, *block(ops[first]), *block(ops[i]), s.x, out, !end || padded, n, s.h, s.w);
      } else {
        together = block(ops[i])->run(here, s.x, out, !end || padded, n, s.h, s.w);
      }
      if (!together && r.n > 1) r.barrier->wait(r.tid, r.n);
      lap(first);
      s = {out, g.h, g.w, other};
    }
    return s;
  }

 private:
  void lap(std::size_t i) {
    if (c_.seconds == nullptr || r_.tid != 0) return;
    const auto t = Clock::now();
    c_.seconds[i] += std::chrono::duration<double>(t - lap_).count();
    lap_ = t;
  }
  const Call& c_;
  const Region& r_;
  Clock::time_point lap_;
};

Tensor one_image(const Tensor& t, int i) { return {t.at(i), 0}; }

void body(void* ctx, int tid, int threads) {
  Call& c = *static_cast<Call*>(ctx);
  const std::vector<Op>& ops = *c.ops;
  const ProgramPlan& p = *c.plan;
  Region r;
  r.kernels = c.kernels, r.barrier = &c.barrier, r.arena = c.arena, r.tid = tid, r.n = threads;
  // there may be fewer threads than asked for
  r.scratch_floats = p.scratch * p.threads / threads / kPage * kPage;
  Draw draw(&c.tickets, tid, threads);
  r.draw = &draw;
  Walk walk(c, r);
  float* half[2] = {c.workspace, c.workspace + p.between};
  Walk::State s{c.x, p.h, p.w, 1};
  const Shape shape = output_shape(ops, p.n, p.h, p.w);
  const auto end = [&] { return image_tensor(c.out, shape.c, shape.h, shape.w); };
  if (p.prefix > 0) {
    // no barrier until each thread has taken its images through: they stay in its cache
    const Shape after = output_shape({ops.begin(), ops.begin() + static_cast<std::ptrdiff_t>(p.prefix)}, p.n, p.h, p.w);
    const bool all = p.prefix == ops.size();
    const Tensor to = all ? end() : blocked_tensor(half[0], after.c, after.h, after.w);
    Region alone = r;
    Draw single(nullptr, 0, 1);
    alone.tid = 0, alone.n = 1, alone.arena = r.scratch(tid), alone.draw = &single;
    const auto image = [&](int i, const Region& by, int owner) {
      float* own = c.workspace + 2 * (p.between + owner * p.image);
      float* const halves[2] = {own, own + p.image};
      walk.run(0, p.prefix, {one_image(c.x, i), p.h, p.w, 1}, 1, halves, one_image(to, i), !all, by);
    };
    const int whole = p.n / threads * threads;
    draw.each(whole, [&](int i, int) { image(i, alone, tid); });
    if (threads > 1) r.barrier->wait(tid, threads);
    for (int i = whole; i < p.n; ++i) image(i, r, 0);
    s = {to, after.h, after.w, 0};
  }
  walk.run(p.prefix, ops.size(), s, p.n, half, end(), false, r);
}

}  // namespace

int input_channels(const Op& op) {
  if (const Mqa* m = attention(op)) return m->desc().c;
  return block(op) != nullptr ? block(op)->desc().c_in : head(op)->desc().c_in;
}

std::string check(const std::vector<Op>& ops) {
  if (ops.empty()) return "ops is empty, expected at least one Block, MobileMQA or Head";
  int channels = input_channels(ops[0]);
  for (std::size_t i = 0; i < ops.size(); ++i) {
    if (input_channels(ops[i]) != channels) {
      return "ops[" + std::to_string(i) + "] takes " + std::to_string(input_channels(ops[i])) +
             " channels, expected the " + std::to_string(channels) + " that come before it";
    }
    if (head(ops[i]) == nullptr) {
      channels = outputs(ops[i]);
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
    const Size g = size_after(op, s.h, s.w);
    s = {n, outputs(op), g.h, g.w};
  }
  return s;
}

std::string refuses(const std::vector<Op>& ops, int h, int w) {
  for (const Op& op : ops) {
    if (head(op) != nullptr) break;
    const std::string expected = attention(op) != nullptr ? attention(op)->refuses(h, w) : std::string();
    if (!expected.empty()) return std::to_string(h) + " x " + std::to_string(w) + " pixels, expected " + expected;
    const Size g = size_after(op, h, w);
    h = g.h, w = g.w;
  }
  return {};
}

namespace {

// Image by image as long as a batch of a thread's images is too large for its cache, and weights are what weighs less.
std::size_t prefix_of(const std::vector<Op>& ops, const std::vector<Pair>& pairs, int n, int h, int w, int threads) {
  const std::size_t each = static_cast<std::size_t>(n / threads), l2 = cpu_info().l2 / sizeof(float);
  if (each < 2) return 0;
  std::size_t i = 0;
  while (i < ops.size() && head(ops[i]) == nullptr) {
    const std::size_t last = i + (pairs[i].band > 0);
    const std::size_t in = static_cast<std::size_t>(units_of(input_channels(ops[i]))) * kUnit * h * w;
    std::size_t weights = 0;
    for (std::size_t j = i; j <= last; ++j) {
      const Size g = size_after(ops[j], h, w);
      h = g.h, w = g.w;
      weights += block(ops[j]) != nullptr ? block(ops[j])->blob_floats() : attention(ops[j])->blob_floats();
    }
    const std::size_t images = in + static_cast<std::size_t>(units_of(outputs(ops[last]))) * kUnit * h * w;
    if (each * images < l2 / 2 || weights > images) break;
    i = last + 1;
  }
  return i;
}

}  // namespace

ProgramPlan plan_program(const std::vector<Op>& ops, int n, int h, int w, int threads) {
  ProgramPlan p;
  p.n = n, p.h = h, p.w = w, p.threads = threads;
  p.pairs.resize(ops.size());
  int y = h, x = w;
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const Op& op = ops[i];
    p.pairs[i] = i > 0 && p.pairs[i - 1].band > 0 ? Pair{} : pair_at(ops, i, y, x);
    // a region may get fewer threads than asked for
    for (int t = 1; t <= threads; ++t) {
      const std::size_t need = pages(std::visit([&](auto* o) { return o->scratch_floats(y, x, t); }, op));
      p.scratch = std::max(p.scratch, (need * t + threads - 1) / threads);
      if (t == 1) p.scratch = std::max(p.scratch, need);
    }
    p.scratch = std::max(p.scratch, p.pairs[i].scratch);
    if (head(op) == nullptr) {
      const Size g = size_after(op, y, x);
      y = g.h, x = g.w;
    }
  }
  p.scratch = pages(p.scratch);
  p.prefix = prefix_of(ops, p.pairs, n, h, w, threads);
  for (std::size_t i = 0; i + 1 < ops.size(); ++i) {
    const Size g = size_after(ops[i], h, w);
    const std::size_t floats = static_cast<std::size_t>(units_of(outputs(ops[i]))) * kUnit * g.h * g.w;
    h = g.h, w = g.w;
    if (p.pairs[i].band > 0) continue;  // the image between a pair is never whole
    if (i + 1 < p.prefix) {
      p.image = std::max(p.image, floats);
    } else {
      p.between = std::max(p.between, floats * n);
    }
  }
  return p;
}

void run(const std::vector<Op>& ops, const ProgramPlan& plan, const KernelTable& kernels, const Tensor& x, float* out,
         float* workspace, float* arena, double* seconds) {
  if (plan.n == 0) return;
  Call c;
  c.ops = &ops, c.plan = &plan, c.kernels = &kernels, c.x = x;
  c.out = out, c.workspace = workspace, c.arena = arena, c.seconds = seconds;
  parallel_run(plan.threads, body, &c);
}

}  // namespace mnv4
