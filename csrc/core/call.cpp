#include "core/call.h"

#include <stdexcept>

#include "core/parallel.h"

namespace mnv4 {
namespace {

thread_local Arena input_arena, workspace_arena;
constexpr std::size_t kInputKept = 1 << 20;  // floats

// Arenas hold floats.
template <class T>
constexpr std::size_t floats(std::size_t elements) {
  return (elements * sizeof(T) + sizeof(float) - 1) / sizeof(float);
}
template <class T>
T* elements(Arena& arena, std::size_t n) {
  return reinterpret_cast<T*>(arena.get(floats<T>(n)));
}

}  // namespace

Arena& scratch_arena() {
  thread_local Arena arena;
  return arena;
}

template <class T>
void run_strided(const BasicOps<T>& ops, const ProgramPlan& plan, const T* x, const Strides& s, T* out, T* workspace,
                 double* seconds) {
  const int n = plan.n, h = plan.h, w = plan.w, threads = plan.threads;
  const Kernels<T>* kernels = kernels_for<T>();
  if (kernels == nullptr) throw std::runtime_error("run: this machine has no kernels for elements of this type");
  T* arena = elements<T>(scratch_arena(), plan.scratch * threads);
  BasicTensor<T> in = strided_tensor(const_cast<T*>(x), s[0], s[1], s[2], s[3]);
  const BasicBlock<T>* const* first = std::get_if<const BasicBlock<T>*>(&ops[0]);
  const int c = input_channels<T>(ops[0]);
  const bool any = first != nullptr && (*first)->any_channel_stride() && !(*first)->desc().residual;
  Arena large;  // a copy of more than kInputKept floats lives for this call only
  if (!any && s[1] != 1 && c > 1) {
    // one pass to channels_last for a block whose first product reads whole pixels
    const std::size_t need = static_cast<std::size_t>(n) * c * h * w;
    struct Job {
      const T* src;
      T* dst;
      Strides s;
      int n, c, h, w;
    } job{x, elements<T>(floats<T>(need) > kInputKept ? large : input_arena, need), s, n, c, h, w};
    parallel_run(
        threads,
        [](void* p, int tid, int parts) {
          const Job& j = *static_cast<Job*>(p);
          const Range rows = split(j.n * j.h, parts, tid);
          for (int r = rows.lo; r < rows.hi; ++r) {
            const T* src = j.src + (r / j.h) * j.s[0] + (r % j.h) * j.s[2];
            T* dst = j.dst + static_cast<std::ptrdiff_t>(r) * j.w * j.c;
            for (int ch = 0; ch < j.c; ++ch) {
              for (int i = 0; i < j.w; ++i)
                dst[static_cast<std::ptrdiff_t>(i) * j.c + ch] = src[ch * j.s[1] + i * j.s[3]];
            }
          }
        },
        &job);
    const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(w) * c;
    in = strided_tensor(job.dst, row * h, 1, row, c);
  }
  if (c == 1) in.image.chan = 1, in.image.unit = kUnit;
  run(ops, plan, *kernels, in, out, workspace, arena, seconds);
}

template <class T>
void forward(const BasicOps<T>& ops, const ProgramPlan& plan, const T* x, const Strides& s, T* out) {
  const std::size_t need = plan.workspace();
  Arena large;  // more than kWorkspaceKept floats live for this call only
  T* workspace = need > 0 ? elements<T>(floats<T>(need) > kWorkspaceKept ? large : workspace_arena, need) : nullptr;
  run_strided(ops, plan, x, s, out, workspace);
}

#define MNV4_OPS_FOR(T)                                                                                         \
  template void run_strided(const BasicOps<T>&, const ProgramPlan&, const T*, const Strides&, T*, T*, double*); \
  template void forward(const BasicOps<T>&, const ProgramPlan&, const T*, const Strides&, T*);
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

std::size_t workspace_kept() { return workspace_arena.floats; }

}  // namespace mnv4
