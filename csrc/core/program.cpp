#include "core/program.h"

#include <algorithm>
#include <chrono>

#include "core/cpu_features.h"

namespace mnv4 {
namespace {

template <class T>
const BasicBlock<T>* block(const BasicOp<T>& op) {
  const BasicBlock<T>* const* b = std::get_if<const BasicBlock<T>*>(&op);
  return b != nullptr ? *b : nullptr;
}

template <class T>
const BasicHead<T>* head(const BasicOp<T>& op) {
  const BasicHead<T>* const* p = std::get_if<const BasicHead<T>*>(&op);
  return p != nullptr ? *p : nullptr;
}

template <class T>
const BasicMqa<T>* attention(const BasicOp<T>& op) {
  const BasicMqa<T>* const* m = std::get_if<const BasicMqa<T>*>(&op);
  return m != nullptr ? *m : nullptr;
}

// of an operation that gives images
template <class T>
int outputs(const BasicOp<T>& op) {
  return block<T>(op) != nullptr ? block<T>(op)->desc().c_out : attention<T>(op)->desc().c;
}

struct Size {
  int h, w;
};
template <class T>
Size size_after(const BasicOp<T>& op, int h, int w) {
  if (const BasicBlock<T>* b = block<T>(op)) {
    const Geometry g = geometry(b->desc(), h, w);
    return {g.h2, g.w2};
  }
  const MqaGeometry g = geometry(attention<T>(op)->desc(), h, w);
  return {g.ho, g.wo};
}

template <class T>
BasicUpcoming<T> upcoming(const BasicOps<T>& ops, std::size_t i) {
  if (i >= ops.size()) return {};
  if (const BasicBlock<T>* b = block<T>(ops[i])) return b->upcoming();
  if (const BasicMqa<T>* m = attention<T>(ops[i])) return m->upcoming();
  return {};
}

// canonical channels_last
template <class T>
BasicTensor<T> image_tensor(T* p, int channels, int h, int w) {
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(w) * channels;
  return strided_tensor(p, row * h, 1, row, channels);
}

template <class T>
Pair pair_at(const BasicOps<T>& ops, std::size_t i, int h, int w) {
  if (i + 1 >= ops.size() || block<T>(ops[i]) == nullptr || block<T>(ops[i + 1]) == nullptr) return {};
  return plan_pair(*block<T>(ops[i]), *block<T>(ops[i + 1]), h, w);
}

// scratch of a thread begins and ends with a page, where the prefetchers of its core stop
template <class T>
constexpr std::size_t kPage = 4096 / sizeof(T);
template <class T>
std::size_t pages(std::size_t elements) {
  return (elements + kPage<T> - 1) / kPage<T> * kPage<T>;
}

template <class T>
struct Call {
  const BasicOps<T>* ops;
  const ProgramPlan* plan;
  const Kernels<T>* kernels;
  BasicTensor<T> x;
  T *out, *workspace, *arena;
  double* seconds;
  Tickets tickets;
  Barrier barrier{0};
};

using Clock = std::chrono::steady_clock;

// What a thread walks through a list.
template <class T>
class Walk {
 public:
  Walk(const Call<T>& c, const BasicRegion<T>& r) : c_(c), r_(r), lap_(Clock::now()) {}

  struct State {
    BasicTensor<T> x;
    int h, w;
    int half;  // where x lies, if in a half
  };

  /// Operations [from, to) on a batch; what lies between them alternates between the two halves, the last one writes
  /// `final`.
  State run(std::size_t from, std::size_t to, State s, int n, T* const half[2], const BasicTensor<T>& final,
            bool padded, const BasicRegion<T>& r) {
    const BasicOps<T>& ops = *c_.ops;
    for (std::size_t i = from; i < to; ++i) {
      if (const BasicHead<T>* last = head<T>(ops[i])) {
        last->run(r, s.x, c_.out, n, s.h, s.w);
        lap(i);
        return s;
      }
      const Pair& pair = c_.plan->pairs[i];
      const std::size_t first = i;
      if (pair.band > 0) ++i;
      BasicRegion<T> here = r;
      here.after = upcoming<T>(ops, i + 1);
      Size g = size_after<T>(ops[first], s.h, s.w);
      if (i > first) g = size_after<T>(ops[i], g.h, g.w);
      const bool end = i + 1 == to;
      const int other = 1 - s.half;
      const BasicTensor<T> out = end ? final : blocked_tensor(half[other], outputs<T>(ops[i]), g.h, g.w);
      bool together = false;
      if (const BasicMqa<T>* m = attention<T>(ops[i])) {
        together = m->run(here, s.x, out, !end || padded, n, s.h, s.w);
      } else if (i > first) {
        run_pair(pair, here, *block<T>(ops[first]), *block<T>(ops[i]), s.x, out, !end || padded, n, s.h, s.w);
      } else {
        together = block<T>(ops[i])->run(here, s.x, out, !end || padded, n, s.h, s.w);
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
  const Call<T>& c_;
  const BasicRegion<T>& r_;
  Clock::time_point lap_;
};

template <class T>
BasicTensor<T> one_image(const BasicTensor<T>& t, int i) {
  return {t.at(i), 0};
}

template <class T>
void body(void* ctx, int tid, int threads) {
  Call<T>& c = *static_cast<Call<T>*>(ctx);
  const BasicOps<T>& ops = *c.ops;
  const ProgramPlan& p = *c.plan;
  BasicRegion<T> r;
  r.kernels = c.kernels, r.barrier = &c.barrier, r.arena = c.arena, r.tid = tid, r.n = threads;
  // there may be fewer threads than asked for
  r.scratch_floats = p.scratch * p.threads / threads / kPage<T> * kPage<T>;
  Draw draw(&c.tickets, tid, threads);
  r.draw = &draw;
  Walk<T> walk(c, r);
  T* half[2] = {c.workspace, c.workspace + p.between};
  typename Walk<T>::State s{c.x, p.h, p.w, 1};
  const Shape shape = output_shape<T>(ops, p.n, p.h, p.w);
  const auto end = [&] { return image_tensor(c.out, shape.c, shape.h, shape.w); };
  if (p.prefix > 0) {
    // no barrier until each thread has taken its images through: they stay in its cache
    const Shape after =
        output_shape<T>({ops.begin(), ops.begin() + static_cast<std::ptrdiff_t>(p.prefix)}, p.n, p.h, p.w);
    const bool all = p.prefix == ops.size();
    const BasicTensor<T> to = all ? end() : blocked_tensor(half[0], after.c, after.h, after.w);
    BasicRegion<T> alone = r;
    Draw single(nullptr, 0, 1);
    alone.tid = 0, alone.n = 1, alone.arena = r.scratch(tid), alone.draw = &single;
    const auto image = [&](int i, const BasicRegion<T>& by, int owner) {
      T* own = c.workspace + 2 * (p.between + owner * p.image);
      T* const halves[2] = {own, own + p.image};
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

template <class T>
int input_channels(const BasicOp<T>& op) {
  if (const BasicMqa<T>* m = attention<T>(op)) return m->desc().c;
  return block<T>(op) != nullptr ? block<T>(op)->desc().c_in : head<T>(op)->desc().c_in;
}

template <class T>
std::string check(const BasicOps<T>& ops) {
  if (ops.empty()) return "ops is empty, expected at least one Block, MobileMQA or Head";
  int channels = input_channels<T>(ops[0]);
  for (std::size_t i = 0; i < ops.size(); ++i) {
    if (input_channels<T>(ops[i]) != channels) {
      return "ops[" + std::to_string(i) + "] takes " + std::to_string(input_channels<T>(ops[i])) +
             " channels, expected the " + std::to_string(channels) + " that come before it";
    }
    if (head<T>(ops[i]) == nullptr) {
      channels = outputs<T>(ops[i]);
    } else if (i + 1 != ops.size()) {
      return "ops[" + std::to_string(i) + "] is a Head, expected it last";
    }
  }
  return {};
}

template <class T>
Shape output_shape(const BasicOps<T>& ops, int n, int h, int w) {
  Shape s{n, 0, h, w};
  for (const BasicOp<T>& op : ops) {
    if (const BasicHead<T>* last = head<T>(op)) return {n, last->features(), 0, 0};
    const Size g = size_after<T>(op, s.h, s.w);
    s = {n, outputs<T>(op), g.h, g.w};
  }
  return s;
}

template <class T>
std::string refuses(const BasicOps<T>& ops, int h, int w) {
  for (const BasicOp<T>& op : ops) {
    if (head<T>(op) != nullptr) break;
    const std::string expected = attention<T>(op) != nullptr ? attention<T>(op)->refuses(h, w) : std::string();
    if (!expected.empty()) return std::to_string(h) + " x " + std::to_string(w) + " pixels, expected " + expected;
    const Size g = size_after<T>(op, h, w);
    h = g.h, w = g.w;
  }
  return {};
}

namespace {

// Image by image as long as a batch of a thread's images is too large for its cache, and weights are what weighs less.
template <class T>
std::size_t prefix_of(const BasicOps<T>& ops, const std::vector<Pair>& pairs, int n, int h, int w, int threads) {
  const std::size_t each = static_cast<std::size_t>(n / threads), l2 = cpu_info().l2 / sizeof(T);
  if (each < 2) return 0;
  std::size_t i = 0;
  while (i < ops.size() && head<T>(ops[i]) == nullptr) {
    const std::size_t last = i + (pairs[i].band > 0);
    const std::size_t in = static_cast<std::size_t>(units_of(input_channels<T>(ops[i]))) * kUnit * h * w;
    std::size_t weights = 0;
    for (std::size_t j = i; j <= last; ++j) {
      const Size g = size_after<T>(ops[j], h, w);
      h = g.h, w = g.w;
      weights += block<T>(ops[j]) != nullptr ? block<T>(ops[j])->blob_floats() : attention<T>(ops[j])->blob_floats();
    }
    const std::size_t images = in + static_cast<std::size_t>(units_of(outputs<T>(ops[last]))) * kUnit * h * w;
    if (each * images < l2 / 2 || weights > images) break;
    i = last + 1;
  }
  return i;
}

}  // namespace

template <class T>
ProgramPlan plan_program(const BasicOps<T>& ops, int n, int h, int w, int threads) {
  ProgramPlan p;
  p.n = n, p.h = h, p.w = w, p.threads = threads;
  p.pairs.resize(ops.size());
  int y = h, x = w;
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const BasicOp<T>& op = ops[i];
    p.pairs[i] = i > 0 && p.pairs[i - 1].band > 0 ? Pair{} : pair_at<T>(ops, i, y, x);
    // a region may get fewer threads than asked for
    for (int t = 1; t <= threads; ++t) {
      const std::size_t need = pages<T>(std::visit([&](auto* o) { return o->scratch_floats(y, x, t); }, op));
      p.scratch = std::max(p.scratch, (need * t + threads - 1) / threads);
      if (t == 1) p.scratch = std::max(p.scratch, need);
    }
    p.scratch = std::max(p.scratch, p.pairs[i].scratch);
    if (head<T>(op) == nullptr) {
      const Size g = size_after<T>(op, y, x);
      y = g.h, x = g.w;
    }
  }
  p.scratch = pages<T>(p.scratch);
  p.prefix = prefix_of<T>(ops, p.pairs, n, h, w, threads);
  for (std::size_t i = 0; i + 1 < ops.size(); ++i) {
    const Size g = size_after<T>(ops[i], h, w);
    const std::size_t floats = static_cast<std::size_t>(units_of(outputs<T>(ops[i]))) * kUnit * g.h * g.w;
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

template <class T>
void run(const BasicOps<T>& ops, const ProgramPlan& plan, const Kernels<T>& kernels, const BasicTensor<T>& x, T* out,
         T* workspace, T* arena, double* seconds) {
  if (plan.n == 0) return;
  Call<T> c;
  c.ops = &ops, c.plan = &plan, c.kernels = &kernels, c.x = x;
  c.out = out, c.workspace = workspace, c.arena = arena, c.seconds = seconds;
  parallel_run(plan.threads, body<T>, &c);
}

#define MNV4_OPS_FOR(T)                                                                                           \
  template std::string check(const BasicOps<T>&);                                                                 \
  template Shape output_shape(const BasicOps<T>&, int, int, int);                                                 \
  template std::string refuses(const BasicOps<T>&, int, int);                                                     \
  template int input_channels<T>(const BasicOp<T>&);                                                              \
  template ProgramPlan plan_program(const BasicOps<T>&, int, int, int, int);                                      \
  template void run(const BasicOps<T>&, const ProgramPlan&, const Kernels<T>&, const BasicTensor<T>&, T*, T*, T*, \
                    double*);
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

}  // namespace mnv4
