// One call of a list of operations: memory of the calling thread, plans of the sizes met, inputs of any strides.
#pragma once

#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "core/program.h"

namespace mnv4 {

using Strides = std::array<std::ptrdiff_t, 4>;

// Scratch of the calling thread: grows, never shrinks, 4 KB aligned.
struct Arena {
  std::unique_ptr<float, void (*)(void*)> data{nullptr, std::free};
  std::size_t floats = 0;
  float* get(std::size_t need) {
    if (need > floats) {
      data.reset();
      floats = 0;
      const std::size_t page = need * sizeof(float) >= kHugePage / 2 ? kHugePage : 4096;
      const std::size_t bytes = (need * sizeof(float) + page - 1) / page * page;
      data.reset(static_cast<float*>(std::aligned_alloc(page, bytes)));
      if (data == nullptr) throw std::bad_alloc();
      if (page == kHugePage) advise_huge(data.get(), bytes);
      floats = bytes / sizeof(float);
    }
    return data.get();
  }
};
/// Of the calling thread.
Arena& scratch_arena();

// The plans of a list for the sizes it has met. The caller sees to it that one thread at a time asks.
template <class T>
class BasicPlans {
 public:
  std::shared_ptr<const ProgramPlan> get(const BasicOps<T>& ops, int n, int h, int w, int threads) {
    for (const auto& p : recent_) {
      if (p->n == n && p->h == h && p->w == w && p->threads == threads) return p;
    }
    auto made = std::make_shared<const ProgramPlan>(plan_program(ops, n, h, w, threads));
    if (recent_.size() < kKeptPlans) {
      recent_.push_back(made);
    } else {
      recent_[oldest_++ % kKeptPlans] = made;
    }
    return made;
  }

 private:
  static constexpr std::size_t kKeptPlans = 16;
  std::vector<std::shared_ptr<const ProgramPlan>> recent_;
  std::size_t oldest_ = 0;
};

using Plans = BasicPlans<float>;

/// Runs a packed list as planned on x [n, c, h, w] with strides in elements (N, C, H, W), n > 0; `out` and `workspace`
/// as in run. std::bad_alloc without memory for scratch, std::runtime_error where the machine has no kernels for T.
template <class T>
void run_strided(const BasicOps<T>& ops, const ProgramPlan& plan, const T* x, const Strides& s, T* out, T* workspace,
                 double* seconds = nullptr);

/// The same in a workspace of the calling thread, which keeps up to kWorkspaceKept floats for the next call.
template <class T>
void forward(const BasicOps<T>& ops, const ProgramPlan& plan, const T* x, const Strides& s, T* out);
inline constexpr std::size_t kWorkspaceKept = 2 << 20;
/// Floats that the calling thread keeps.
std::size_t workspace_kept();

}  // namespace mnv4
