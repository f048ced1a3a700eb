#include "bindings/common.h"

#include "core/parallel.h"

namespace mnv4 {
namespace {

thread_local Arena input_arena;
constexpr std::size_t kKept = 1 << 20, kWorkspaceKept = 2 << 20;  // floats

}  // namespace

Arena& scratch_arena() {
  thread_local Arena arena;
  return arena;
}

Arena& workspace_arena() {
  thread_local Arena arena;
  return arena;
}

bool same_padding(const std::string& padding, const char* cls) {
  if (padding != "symmetric" && padding != "same") {
    throw std::invalid_argument(std::string(cls) + ": padding = '" + padding + "', expected symmetric or same");
  }
  return padding == "same";
}

void require_valid(const std::string& what, const std::string& message) {
  if (!message.empty()) throw std::invalid_argument(what + ": " + message);
}

void require_least(const char* where, const char* name, int value, int least) {
  if (value >= least) return;
  throw std::invalid_argument(std::string(where) + ": " + name + " = " + std::to_string(value) +
                              ", expected at least " + std::to_string(least));
}

void require_size(const char* where, int n, int h, int w) {
  require_least(where, "n", n, 0);
  require_least(where, "h", h, 1);
  require_least(where, "w", w, 1);
}

std::array<std::int32_t, 16> numbers(const BlockDesc& d) {
  return {d.c_in,
          d.c_mid,
          d.c_out,
          d.start_kernel,
          d.start_stride,
          d.expand,
          d.expand_kernel,
          d.expand_stride,
          d.mid_kernel,
          d.mid_stride,
          d.project,
          d.residual,
          d.same_padding,
          0,
          0,
          0};
}
std::array<std::int32_t, 16> numbers(const MqaDesc& d) {
  return {d.c,    d.heads,      d.key_dim,      d.value_dim, d.kv_kernel, d.kv_stride, d.query_stride,
          d.norm, d.query_norm, d.same_padding, d.residual};
}
std::array<std::int32_t, 16> numbers(const HeadDesc& d) { return {d.c_in, d.c_feat, d.c_hidden, d.classes}; }

StageParams stage_params(Address weight, Address bias, Address bn_weight, Address bn_bias, Address bn_mean,
                         Address bn_var, double eps, Address gamma, bool bare) {
  if (bare && (weight != 0 || bias != 0 || gamma != 0 || bn_mean == 0))
    throw std::invalid_argument("pack: expected bn_mean and bn_var, and no weight, bias and gamma, for a norm");
  if (!bare && weight == 0) throw std::invalid_argument("pack: weight = 0, expected the address of a float32 array");
  if ((bn_mean == 0) != (bn_var == 0)) throw std::invalid_argument("pack: expected bn_mean and bn_var together");
  if ((bn_weight != 0 || bn_bias != 0) && bn_mean == 0)
    throw std::invalid_argument("pack: bn_weight or bn_bias without bn_mean and bn_var");
  if (!(eps >= 0.0)) throw std::invalid_argument("pack: eps = " + std::to_string(eps) + ", expected at least 0");
  return {at(weight), at(bias), at(bn_weight), at(bn_bias), at(bn_mean), at(bn_var), eps, at(gamma)};
}

namespace {

const KernelTable& kernels_of(const float*) { return active_kernels(); }
#if defined(MNV4_OPS_HALF)
const BasicKernels<Half>& kernels_of(const Half*) {
  const BasicKernels<Half>* k = half_kernels();
  if (k == nullptr) throw std::runtime_error("run: this machine has no fp16 arithmetic");
  return *k;
}
#endif

// Arenas hold floats.
template <class T>
T* elements(Arena& arena, std::size_t n) {
  return reinterpret_cast<T*>(arena.get((n * sizeof(T) + sizeof(float) - 1) / sizeof(float)));
}

}  // namespace

template <class T>
void run_ops(const BasicOps<T>& ops, BasicPlans<T>* plans, Address x, int n, int h, int w, const Strides& s,
             Address out, Address workspace, int threads, double* seconds) {
  for (const BasicOp<T>& op : ops) {
    const bool packed = std::visit([](auto* p) { return p->packed(); }, op);
    if (!packed) throw std::runtime_error("run: a stage has no packed parameters, call pack() for each stage first");
  }
  require_size("run", n, h, w);
  require_least("run", "threads", threads, 1);
  require_valid("run", refuses(ops, h, w));
  if (n == 0) return;
  BasicPlans<T> none;
  const std::shared_ptr<const ProgramPlan> plan = (plans != nullptr ? *plans : none).get(ops, n, h, w, threads);
  if (workspace == 0 && plan->workspace() > 0) {
    throw std::invalid_argument("run: workspace = 0, expected the address of workspace_bytes() of memory");
  }
  if (x == 0 || out == 0) throw std::invalid_argument("run: x or out is 0, expected addresses");
  const Kernels<T>& kernels = kernels_of(static_cast<const T*>(nullptr));
  T* arena = elements<T>(scratch_arena(), plan->scratch * threads);
  BasicTensor<T> in = strided_tensor(reinterpret_cast<T*>(x), s[0], s[1], s[2], s[3]);
  const BasicBlock<T>* const* first = std::get_if<const BasicBlock<T>*>(&ops[0]);
  const int c = input_channels<T>(ops[0]);
  const bool any = first != nullptr && (*first)->any_channel_stride() && !(*first)->desc().residual;
  T* copy = nullptr;
  Arena large;  // a copy of more than kKept elements lives for this call only
  if (!any && s[1] != 1 && c > 1) {
    const std::size_t need = static_cast<std::size_t>(n) * c * h * w;
    copy = elements<T>(need > kKept ? large : input_arena, need);
  }

  py::gil_scoped_release release;
  if (copy != nullptr) {
    // one pass to channels_last for a block whose first product reads whole pixels
    struct Job {
      const T* src;
      T* dst;
      Strides s;
      int n, c, h, w;
    } job{reinterpret_cast<const T*>(x), copy, s, n, c, h, w};
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
    in = strided_tensor(copy, row * h, 1, row, c);
  }
  if (c == 1) in.image.chan = 1, in.image.unit = kUnit;
  run(ops, *plan, kernels, in, reinterpret_cast<T*>(out), reinterpret_cast<T*>(workspace), arena, seconds);
}

template void run_ops(const BasicOps<float>&, BasicPlans<float>*, Address, int, int, int, const Strides&, Address,
                      Address, int, double*);
#if defined(MNV4_OPS_HALF)
template void run_ops(const BasicOps<Half>&, BasicPlans<Half>*, Address, int, int, int, const Strides&, Address,
                      Address, int, double*);
#endif

void run_program(const PyProgram& p, Address x, int n, int h, int w, const Strides& s, Address out, int threads) {
  const std::size_t need = n > 0 ? p.plans.get(p.ops, n, h, w, threads)->workspace() : 0;
  Arena large;
  float* workspace = need > 0 ? (need > kWorkspaceKept ? large : workspace_arena()).get(need) : nullptr;
  run_ops(p.ops, &p.plans, x, n, h, w, s, out, reinterpret_cast<Address>(workspace), threads);
}

}  // namespace mnv4
