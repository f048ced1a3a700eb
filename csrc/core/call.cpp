#include "core/call.h"

#include "core/parallel.h"

namespace mnv4 {
namespace {

thread_local Arena input_arena, workspace_arena;
constexpr std::size_t kInputKept = 1 << 20;  // floats

}  // namespace

Arena& scratch_arena() {
  thread_local Arena arena;
  return arena;
}

void run_strided(const std::vector<Op>& ops, const ProgramPlan& plan, const float* x, const Strides& s, float* out,
                 float* workspace, double* seconds) {
  const int n = plan.n, h = plan.h, w = plan.w, threads = plan.threads;
  float* arena = scratch_arena().get(plan.scratch * threads);
  Tensor in = strided_tensor(const_cast<float*>(x), s[0], s[1], s[2], s[3]);
  const Block* const* first = std::get_if<const Block*>(&ops[0]);
  const int c = input_channels(ops[0]);
  const bool any = first != nullptr && (*first)->any_channel_stride() && !(*first)->desc().residual;
  Arena large;  // a copy of more than kInputKept floats lives for this call only
  if (!any && s[1] != 1 && c > 1) {
    // one pass to channels_last for a block whose first product reads whole pixels
    const std::size_t need = static_cast<std::size_t>(n) * c * h * w;
    struct Job {
      const float* src;
      float* dst;
      Strides s;
      int n, c, h, w;
    } job{x, (need > kInputKept ? large : input_arena).get(need), s, n, c, h, w};
    parallel_run(
        threads,
        [](void* p, int tid, int parts) {
          const Job& j = *static_cast<Job*>(p);
          const Range rows = split(j.n * j.h, parts, tid);
          for (int r = rows.lo; r < rows.hi; ++r) {
            const float* src = j.src + (r / j.h) * j.s[0] + (r % j.h) * j.s[2];
            float* dst = j.dst + static_cast<std::ptrdiff_t>(r) * j.w * j.c;
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
  run(ops, plan, active_kernels(), in, out, workspace, arena, seconds);
}

void forward(const std::vector<Op>& ops, const ProgramPlan& plan, const float* x, const Strides& s, float* out) {
  const std::size_t need = plan.workspace();
  Arena large;  // more than kWorkspaceKept floats live for this call only
  float* workspace = need > 0 ? (need > kWorkspaceKept ? large : workspace_arena).get(need) : nullptr;
  run_strided(ops, plan, x, s, out, workspace);
}

std::size_t workspace_kept() { return workspace_arena.floats; }

}  // namespace mnv4
