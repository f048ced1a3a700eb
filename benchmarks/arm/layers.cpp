// Runs the operations given on standard input, one a line, between marker instructions: nothing but the operation is in
// the region.
//   block C_IN C_MID C_OUT START_K START_S EXPAND EXPAND_K EXPAND_S MID_K MID_S PROJECT RESIDUAL SAME ACT x 4 H W
//   mqa C HEADS KEY_DIM VALUE_DIM KV_KERNEL KV_STRIDE RESIDUAL H W
//   head C_IN C_FEAT C_HIDDEN CLASSES FEAT_ACT HIDDEN_ACT H W
// With the argument "model" all of them run as one program instead, the only region; with "float16" or "bfloat16" in
// these elements; with "warm" after a run outside of the region. One image, channels_last, one thread.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "core/program.h"

namespace {

using namespace mnv4;

// no-ops on every core; the plugin resets at the first and reports at the second
inline void mark_begin() {
#if defined(__aarch64__)
  asm volatile("hint #64" ::: "memory");
#endif
}
inline void mark_end() {
#if defined(__aarch64__)
  asm volatile("hint #65" ::: "memory");
#endif
}

template <class T>
std::vector<T> numbers(std::size_t n) {
  std::vector<T> v(n);
  std::uint32_t state = 1;
  for (T& x : v) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<T>(static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-33f);
  }
  return v;
}

template <class T>
void run_marked(const BasicOps<T>& ops, int c, int h, int w, bool warm) {
  const ProgramPlan plan = plan_program(ops, 1, h, w, 1);
  const Shape s = output_shape(ops, 1, h, w);
  const std::vector<T> x = numbers<T>(static_cast<std::size_t>(c) * h * w);
  std::vector<T> out(static_cast<std::size_t>(s.c) * (s.h > 0 ? s.h * s.w : 1));
  // buffers at fixed offsets within a page: the count must not depend on where memory happens to lie
  const Buffer workspace = make_buffer(plan.workspace() + 16), arena = make_buffer(plan.scratch + 16);
  T* const between = reinterpret_cast<T*>(workspace.get());
  T* const scratch = reinterpret_cast<T*>(arena.get());
  const BasicTensor<T> in = strided_tensor(const_cast<T*>(x.data()), static_cast<std::ptrdiff_t>(c) * h * w, 1,
                                           static_cast<std::ptrdiff_t>(w) * c, c);
  const Kernels<T>& kernels = *kernels_for<T>();
  if (warm) run(ops, plan, kernels, in, out.data(), between, scratch);
  mark_begin();
  run(ops, plan, kernels, in, out.data(), between, scratch);
  mark_end();
}

// For sums of so many products with numbers(), which have a variance of 1 / 48: the layers of a model then neither grow
// nor overflow 16 bits, which would be another way. A product without BatchNorm is another one too; only the classifier
// has none.
std::vector<float> variance_of(int terms) { return std::vector<float>(1 << 13, static_cast<float>(terms) / 48.0f); }

template <class T>
int run_lines(bool model, bool warm) {
  if (kernels_for<T>() == nullptr) return std::fprintf(stderr, "this machine has no kernels for these elements\n"), 2;
  std::vector<std::unique_ptr<BasicBlock<T>>> blocks;
  std::vector<std::unique_ptr<BasicMqa<T>>> attentions;
  std::vector<std::unique_ptr<BasicHead<T>>> heads;
  BasicOps<T> all;
  int first_c = 0, first_h = 0, first_w = 0;
  const std::vector<float> ones(1 << 13, 1.0f);
  std::vector<float> variance;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream in(line);
    std::string kind;
    in >> kind;
    int h = 0, w = 0, c = 0;
    if (kind == "block") {
      BlockDesc d;
      int act[4];
      in >> d.c_in >> d.c_mid >> d.c_out >> d.start_kernel >> d.start_stride >> d.expand >> d.expand_kernel >>
          d.expand_stride >> d.mid_kernel >> d.mid_stride >> d.project >> d.residual >> d.same_padding >> act[0] >>
          act[1] >> act[2] >> act[3] >> h >> w;
      for (int i = 0; i < 4; ++i) d.act[i] = static_cast<Act>(act[i]);
      if (!in || !check(d).empty()) return std::fprintf(stderr, "bad line: %s\n", line.c_str()), 2;
      c = d.c_in;
      blocks.push_back(std::make_unique<BasicBlock<T>>(d));
      const int widest = std::max({d.c_in, d.c_mid, d.c_out}), taps = d.expand_kernel * d.expand_kernel;
      const std::vector<float> weight = numbers<float>(static_cast<std::size_t>(widest) * std::max(widest * taps, 25));
      for (int s = 0; s < kStages; ++s) {
        StageParams p;
        p.weight = p.bias = weight.data();
        if (sizeof(T) == 2) {
          const int kernel = s == 0 ? d.start_kernel : d.mid_kernel;
          const bool depthwise = s == 0 || s == 2;
          variance = variance_of(depthwise ? kernel * kernel : s == 1 ? d.c_in * taps : d.c_mid);
          p.bn_mean = weight.data(), p.bn_var = variance.data();
        }
        blocks.back()->pack(static_cast<Stage>(s), p);
      }
      all.emplace_back(blocks.back().get());
    } else if (kind == "mqa") {
      MqaDesc d;
      in >> d.c >> d.heads >> d.key_dim >> d.value_dim >> d.kv_kernel >> d.kv_stride >> d.residual >> h >> w;
      if (!in || !check(d).empty()) return std::fprintf(stderr, "bad line: %s\n", line.c_str()), 2;
      c = d.c;
      attentions.push_back(std::make_unique<BasicMqa<T>>(d));
      const int widest = std::max({d.c, d.heads * d.key_dim, d.heads * d.value_dim, d.kv_kernel * d.kv_kernel});
      const std::vector<float> weight = numbers<float>(static_cast<std::size_t>(widest) * widest);
      for (int s = 0; s < kMqaStages; ++s) {
        if (!attentions.back()->has(static_cast<MqaStage>(s))) continue;
        StageParams p;
        p.weight = weight.data();
        if (s == static_cast<int>(MqaStage::norm)) p.bn_mean = weight.data(), p.bn_var = ones.data();
        attentions.back()->pack(static_cast<MqaStage>(s), p);
      }
      all.emplace_back(attentions.back().get());
    } else {
      HeadDesc d;
      int feat, hidden;
      in >> d.c_in >> d.c_feat >> d.c_hidden >> d.classes >> feat >> hidden >> h >> w;
      d.feat_act = static_cast<Act>(feat), d.hidden_act = static_cast<Act>(hidden);
      if (!in || !check(d).empty()) return std::fprintf(stderr, "bad line: %s\n", line.c_str()), 2;
      c = d.c_in;
      heads.push_back(std::make_unique<BasicHead<T>>(d));
      const int widest = std::max({d.c_in, d.c_feat, d.c_hidden, d.classes});
      const std::vector<float> weight = numbers<float>(static_cast<std::size_t>(widest) * widest);
      for (int s = 0; s < 3; ++s) {
        StageParams p;
        p.weight = p.bias = weight.data();
        if (sizeof(T) == 2 && s < 2) {
          variance = variance_of(s == 0 || d.c_feat == 0 ? d.c_in : d.c_feat);
          p.bn_mean = weight.data(), p.bn_var = variance.data();
        }
        heads.back()->pack(s, p);
      }
      all.emplace_back(heads.back().get());
    }
    if (all.size() == 1) first_c = c, first_h = h, first_w = w;
    if (!model) run_marked<T>({all.back()}, c, h, w, warm);
  }
  if (model) run_marked<T>(all, first_c, first_h, first_w, warm);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  bool model = false, half = false, bfloat = false, warm = false;
  for (int i = 1; i < argc; ++i) {
    model = model || std::strcmp(argv[i], "model") == 0;
    half = half || std::strcmp(argv[i], "float16") == 0;
    bfloat = bfloat || std::strcmp(argv[i], "bfloat16") == 0;
    warm = warm || std::strcmp(argv[i], "warm") == 0;
  }
#if defined(MNV4_OPS_HALF)
  if (half) return run_lines<Half>(model, warm);
  if (bfloat) return run_lines<BFloat16>(model, warm);
#endif
  if (half || bfloat) return std::fprintf(stderr, "this library has float32 alone\n"), 2;
  return run_lines<float>(model, warm);
}
