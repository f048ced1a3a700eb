// Block against the naive definition: every kind of block, tier, layout, batch, number of threads and size of cache.
#include "core/parallel.h"
#include "naive.h"

namespace mnv4::test {
namespace {

struct Job {
  const Block* block;
  Region region;
  Barrier barrier;
  Tickets* tickets;
  Tensor x, out;
  bool padded;
  int n, h, w;
};

void run(const Block& block, const KernelTable& kernels, const Tensor& x, const Tensor& out, bool padded, int n, int h,
         int w, int threads, float* arena) {
  Tickets tickets;
  Job job{&block, {}, Barrier{0}, &tickets, x, out, padded, n, h, w};
  job.region.kernels = &kernels, job.region.barrier = &job.barrier, job.region.arena = arena;
  job.region.scratch_floats = block.scratch_floats(h, w, threads);
  parallel_run(
      threads,
      [](void* p, int tid, int team) {
        const Job& j = *static_cast<Job*>(p);
        Region r = j.region;
        r.tid = tid, r.n = team;
        Draw draw(j.tickets, tid, team);
        r.draw = &draw;
        j.block->run(r, j.x, j.out, j.padded, j.n, j.h, j.w);
      },
      &job);
}

/// The channels that exist; those that fill the last unit may hold anything.
bool same_bits(const std::vector<float>& first, const Guarded& output, const Tensor& out, int channels, int n,
               const Geometry& g) {
  for (int i = 0; i < n; ++i) {
    for (int c = 0; c < channels; ++c) {
      for (int y = 0; y < g.h2; ++y) {
        for (int x = 0; x < g.w2; ++x) {
          const float* p = element(out, i, c, y, x);
          if (std::memcmp(p, &first[p - output.data()], sizeof *p) != 0) return false;
        }
      }
    }
  }
  return true;
}

void run_case(Random& r, int number) {
  BlockDesc d = random_desc(r, number % kKinds);
  CHECK(check(d).empty(), check(d));
  static constexpr int sides[] = {1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 14, 23};
  static constexpr int batches[] = {0, 1, 1, 1, 2, 3, 4, 5};
  static constexpr std::size_t caches[] = {4 << 10, 16 << 10, 48 << 10, 160 << 10};
  const int n = r.pick(batches);
  int h = r.pick(sides), w = r.pick(sides);
  packed_at_end = r.chance(70);
  const BlockCase c(r, d);
  while (c.cost(h, w) * n > 3e6 && h * w > 1) (h > w ? h : w) = ((h > w ? h : w) + 1) / 2;

  Block block(d);
  c.pack(block);
  Layout layouts[5] = {Layout::channels_last, Layout::gaps, Layout::blocked};
  const int count = block.any_channel_stride() && !d.residual ? 5 : 3;
  layouts[3] = Layout::planar, layouts[4] = Layout::odd;
  const Layout layout = layouts[r.between(0, count - 1)];
  const Layout to = r.chance(40) ? Layout::blocked : r.chance(50) ? Layout::gaps : Layout::channels_last;
  const bool padded = to == Layout::blocked;

  const std::vector<Image> images = random_images(r, n, d.c_in, h, w);
  std::vector<Image> want;
  for (const Image& im : images) want.push_back(c.run(im));
  const Geometry g = geometry(d, h, w);
  for (const Image& im : want) CHECK(im.h == g.h2 && im.w == g.w2, "output size");

  const bool at_end = r.chance(70);
  std::size_t x_floats, out_floats;
  Random same = r;  // odd strides are drawn twice
  Random again = same;
  lay_out(layout, same, nullptr, n, d.c_in, h, w, x_floats);
  const Guarded input(x_floats, at_end);
  const Tensor x = lay_out(layout, again, input.data(), n, d.c_in, h, w, x_floats);
  store(x, layout, images);
  const std::vector<float> before(input.data(), input.data() + x_floats);
  Random out_size = r, out_place = r;
  lay_out(to, out_size, nullptr, n, d.c_out, g.h2, g.w2, out_floats);

  const std::size_t l2 = cpu_info().l2;
  const std::size_t small = r.pick(caches);
  const std::string base = c.text() + " image " + std::to_string(n) + "x" + std::to_string(h) + "x" +
                           std::to_string(w) + " from " + name_of(layout) + " to " + name_of(to);
  for (const KernelTable* kernels : tiers()) {
    std::vector<float> first;
    // no number of threads and no size of the cache changes a bit
    for (int variant = 0; variant < 6; ++variant) {
      const int threads = variant < 4 ? variant + 1 : variant == 4 ? 1 : r.between(2, 4);
      set_l2(variant < 2 ? l2 : small);
      const std::string what = "case " + std::to_string(number) + ", " + kernels->name + ", " +
                               std::to_string(threads) + " threads, L2 " + std::to_string(cpu_info().l2) + ": " + base;
      const Guarded scratch(block.scratch_floats(h, w, threads) * threads, r.chance(70));
      const Guarded output(out_floats, at_end);
      Random place = out_place;
      const Tensor out = lay_out(to, place, output.data(), n, d.c_out, g.h2, g.w2, out_floats);
      if (std::getenv("MNV4_OPS_TEST_VERBOSE") != nullptr) std::fprintf(stderr, "%s\n", what.c_str());
      run(block, *kernels, x, out, padded, n, h, w, threads, scratch.data());
      if (variant == 0) {
        check_output(output, out, padded, want, what);
        first.assign(output.data(), output.data() + out_floats);
      } else {
        CHECK(same_bits(first, output, out, d.c_out, n, g), "not the same bits, " + what);
      }
      CHECK(scratch.intact() && output.intact(), what);
    }
  }
  set_l2(l2);
  CHECK(before.empty() || std::memcmp(before.data(), input.data(), before.size() * sizeof(float)) == 0,
        "the input was written, " + base);
}

}  // namespace
}  // namespace mnv4::test

int main() {
  using namespace mnv4::test;
  Budget budget("block", 400);
  const unsigned long only = env_number("MNV4_OPS_TEST_ONLY", 0);
  for (int number = 0; budget.more(); ++number) {
    if (only != 0 && static_cast<unsigned long>(number) != only) continue;
    // each case has numbers of its own, so that one can be run alone
    Random r(budget.seed() * 1000003 + static_cast<std::uint64_t>(number));
    run_case(r, number);
  }
  return failures != 0;
}
