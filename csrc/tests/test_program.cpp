// Program: a list in one parallel region against the naive definition, with pairs in bands of rows and heads;
// workspace, scratch and output of exactly the floats that are asked for.
#include "core/program.h"

#include <deque>

#include "naive.h"

namespace mnv4::test {
namespace {

/// A list of blocks and perhaps a head, with its parameters.
struct List {
  std::deque<BlockCase> cases;
  std::deque<Block> blocks;
  std::deque<HeadCase> head_cases;
  std::deque<Head> heads;
  std::vector<Op> ops;

  void add(Random& r, const BlockDesc& d) {
    CHECK(mnv4::check(d).empty(), mnv4::check(d));
    cases.emplace_back(r, d);
    blocks.emplace_back(d);
    cases.back().pack(blocks.back());
    ops.push_back(&blocks.back());
  }
  void add(Random& r, const HeadDesc& d) {
    CHECK(mnv4::check(d).empty(), mnv4::check(d));
    head_cases.emplace_back(r, d);
    heads.emplace_back(d);
    head_cases.back().pack(heads.back());
    ops.push_back(&heads.back());
  }
  Image run(const Image& x) const {
    Image t = x;
    for (const BlockCase& c : cases) t = c.run(t);
    return head_cases.empty() ? t : head_cases.back().run(t);
  }
  std::string text() const {
    std::string all;
    for (const BlockCase& c : cases) all += "[" + c.text() + "] ";
    for (const HeadCase& c : head_cases) all += "[" + c.text() + "]";
    return all;
  }
};

HeadDesc random_head(Random& r, int c_in, int options) {
  static constexpr int channels[] = {1, 7, 16, 24, 33, 96, 130};
  HeadDesc d;
  d.c_in = c_in;
  if (options & 1) d.c_feat = r.chance(20) ? 400 : r.pick(channels), d.feat_act = static_cast<Act>(r.between(0, 3));
  if (options & 2) d.c_hidden = r.chance(20) ? 400 : r.pick(channels), d.hidden_act = static_cast<Act>(r.between(0, 3));
  if (options & 4) d.classes = r.pick(channels);
  return d;
}

BlockDesc dense(Random& r, int c_in, int c_mid, int c_out, int stride) {
  BlockDesc d;
  d.c_in = c_in, d.c_mid = c_mid, d.c_out = c_out > 0 ? c_out : c_mid;
  d.expand = true, d.expand_kernel = 3, d.expand_stride = stride, d.project = c_out > 0;
  d.act[1] = static_cast<Act>(r.between(0, 3));
  d.act[3] = static_cast<Act>(r.between(0, 3));
  d.same_padding = r.chance(40);
  return d;
}

/// kind 0: head alone. 1: stem and a dense block behind it, as a pair when the cache is small, perhaps a second pair.
/// 2: random blocks. 3: blocks and head.
List random_list(Random& r, int number, int& channels) {
  static constexpr int narrow[] = {3, 8, 15, 16, 17, 24};
  List list;
  const int kind = number % 4;
  channels = r.pick(narrow);
  int c = channels;
  if (kind == 1) {
    channels = c = r.chance(70) ? 3 : c;
    const int first = r.pick(narrow), second = r.pick(narrow);
    list.add(r, dense(r, c, first, 0, r.between(1, 2)));
    list.add(r, dense(r, first, second, r.chance(70) ? r.pick(narrow) : 0, r.between(1, 2)));
    c = list.cases.back().d.c_out;
    if (r.chance(50)) {
      const int third = r.pick(narrow);
      list.add(r, dense(r, c, third, 0, 1));
      list.add(r, dense(r, third, r.pick(narrow), 0, r.between(1, 2)));
      c = list.cases.back().d.c_out;
    }
  }
  for (int i = kind == 2 ? 0 : 1, n = kind == 0 ? 0 : r.between(1, 4); i < n; ++i) {
    BlockDesc d = random_desc(r, r.between(0, kKinds - 1));
    // the same kind over the channels that come before it
    if (!d.expand && !d.project) d.c_out = c;
    if (!d.expand) d.c_mid = c;
    d.c_in = c;
    if (d.residual) {
      if (!d.project) d.c_mid = c;
      d.c_out = c;
    }
    list.add(r, d);
    c = d.c_out;
  }
  if (kind == 0 || kind == 3) list.add(r, random_head(r, c, (number / 4) % 8));
  if (list.ops.empty()) list.add(r, dense(r, c, 8, 8, 2));
  return list;
}

void run_case(Random& r, int number) {
  packed_at_end = r.chance(70);
  int channels;
  const List list = random_list(r, number, channels);
  CHECK(check(list.ops).empty(), check(list.ops));
  static constexpr int batches[] = {0, 1, 1, 2, 3, 5};
  const int n = number % 32 == 4 ? 17 : r.pick(batches);
  int h = r.between(1, 23), w = r.between(1, 19);
  for (;;) {
    double cost = 0.0;
    for (const BlockCase& c : list.cases) cost += c.cost(h, w);
    for (const HeadCase& c : list.head_cases) cost += static_cast<double>(h) * w * c.d.c_in * std::max(1, c.d.c_feat);
    if (cost * n < 3e6 || h * w == 1) break;
    (h > w ? h : w) = ((h > w ? h : w) + 1) / 2;
  }

  const bool any = !list.blocks.empty() && list.blocks[0].any_channel_stride() && !list.cases[0].d.residual;
  static constexpr Layout layouts[] = {Layout::channels_last, Layout::gaps, Layout::planar, Layout::odd};
  const Layout layout = layouts[r.between(0, any ? 3 : 1)];
  const std::vector<Image> images = random_images(r, n, channels, h, w);
  std::vector<Image> want;
  for (const Image& im : images) want.push_back(list.run(im));
  const Shape shape = output_shape(list.ops, n, h, w);
  const int ho = std::max(1, shape.h), wo = std::max(1, shape.w);
  for (const Image& im : want) CHECK(im.c == shape.c && im.h == ho && im.w == wo, "output shape, " + list.text());

  std::size_t x_floats, out_floats;
  Random same = r, again = r;
  lay_out(layout, same, nullptr, n, channels, h, w, x_floats);
  const Guarded input(x_floats, r.chance(70));
  const Tensor x = lay_out(layout, again, input.data(), n, channels, h, w, x_floats);
  store(x, layout, images);

  const std::size_t l2 = cpu_info().l2;
  static constexpr std::size_t caches[] = {4 << 10, 16 << 10, 48 << 10};
  const std::size_t small = r.pick(caches);
  for (const KernelTable* kernels : tiers()) {
    std::vector<float> first;
    for (int variant = 0; variant < 6; ++variant) {
      // many of them have less than two rows each
      const int threads = variant < 4    ? variant + 1
                          : variant == 4 ? 1
                          : r.chance(50) ? r.between(2, 4)
                                         : r.between(9, 24);
      set_l2(variant < 2 ? l2 : small);
      bool paired = false;
      for (std::size_t i = 0; i + 1 < list.blocks.size() && i < 1; ++i)
        paired = plan_pair(list.blocks[0], list.blocks[1], h, w).band > 0;
      const std::string what = "case " + std::to_string(number) + ", " + kernels->name + ", " +
                               std::to_string(threads) + " threads, L2 " + std::to_string(cpu_info().l2) +
                               (paired ? " pair" : "") + ": " + list.text() + " image " + std::to_string(n) + "x" +
                               std::to_string(h) + "x" + std::to_string(w) + " from " + name_of(layout);
      if (std::getenv("MNV4_OPS_TEST_VERBOSE") != nullptr) std::fprintf(stderr, "%s\n", what.c_str());
      const ProgramPlan plan = plan_program(list.ops, n, h, w, threads);
      const Guarded arena(plan.scratch * threads, r.chance(70)), workspace(plan.workspace(), r.chance(70));
      out_floats = static_cast<std::size_t>(n) * shape.c * ho * wo;
      const Guarded output(out_floats, r.chance(70));
      run(list.ops, plan, *kernels, x, output.data(), workspace.data(), arena.data());
      const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(wo) * shape.c;
      if (variant == 0) {
        check_output(output, strided_tensor(output.data(), row * ho, 1, row, shape.c), false, want, what);
        first.assign(output.data(), output.data() + out_floats);
      } else if (n > 0) {
        CHECK(std::memcmp(first.data(), output.data(), first.size() * sizeof(float)) == 0,
              "not the same bits, " + what);
      }
      CHECK(arena.intact() && workspace.intact() && output.intact(), what);
    }
  }
  set_l2(l2);
}

void refusals() {
  Random r(5);
  List list;
  list.add(r, dense(r, 3, 8, 0, 2));
  list.add(r, dense(r, 9, 8, 0, 1));
  CHECK(!check(list.ops).empty(), "channels that do not follow");
  CHECK(!check(std::vector<Op>{}).empty(), "an empty list");
  List early;
  early.add(r, random_head(r, 8, 7));
  early.add(r, dense(r, early.heads[0].features(), 8, 0, 1));
  CHECK(!check(early.ops).empty(), "a head that is not last");
}

}  // namespace
}  // namespace mnv4::test

int main() {
  using namespace mnv4::test;
  Budget budget("program", 240);
  refusals();
  const unsigned long only = env_number("MNV4_OPS_TEST_ONLY", 0);
  for (int number = 0; budget.more(); ++number) {
    if (only != 0 && static_cast<unsigned long>(number) != only) continue;
    Random r(budget.seed() * 1000003 + static_cast<std::uint64_t>(number));
    run_case(r, number);
  }
  return failures != 0;
}
