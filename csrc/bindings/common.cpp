#include "bindings/common.h"

namespace mnv4 {

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

/// Checks a call; null where there is nothing to do.
template <class T>
std::shared_ptr<const ProgramPlan> plan_call(const BasicOps<T>& ops, BasicPlans<T>* plans, Address x, int n, int h,
                                             int w, Address out, int threads) {
  for (const BasicOp<T>& op : ops) {
    const bool packed = std::visit([](auto* p) { return p->packed(); }, op);
    if (!packed) throw std::runtime_error("run: a stage has no packed parameters, call pack() for each stage first");
  }
  require_size("run", n, h, w);
  require_least("run", "threads", threads, 1);
  require_valid("run", refuses(ops, h, w));
  if (n == 0) return nullptr;
  if (x == 0 || out == 0) throw std::invalid_argument("run: x or out is 0, expected addresses");
  BasicPlans<T> none;
  return (plans != nullptr ? *plans : none).get(ops, n, h, w, threads);
}

}  // namespace

template <class T>
void run_ops(const BasicOps<T>& ops, BasicPlans<T>* plans, Address x, int n, int h, int w, const Strides& s,
             Address out, Address workspace, int threads, double* seconds) {
  const std::shared_ptr<const ProgramPlan> plan = plan_call(ops, plans, x, n, h, w, out, threads);
  if (plan == nullptr) return;
  if (workspace == 0 && plan->workspace() > 0) {
    throw std::invalid_argument("run: workspace = 0, expected the address of workspace_bytes() of memory");
  }
  py::gil_scoped_release release;
  run_strided(ops, *plan, reinterpret_cast<const T*>(x), s, reinterpret_cast<T*>(out), reinterpret_cast<T*>(workspace),
              seconds);
}

template <class T>
void run_program(const BasicPyProgram<T>& p, Address x, int n, int h, int w, const Strides& s, Address out,
                 int threads) {
  const std::shared_ptr<const ProgramPlan> plan = plan_call(p.ops, &p.plans, x, n, h, w, out, threads);
  if (plan == nullptr) return;
  py::gil_scoped_release release;
  forward(p.ops, *plan, reinterpret_cast<const T*>(x), s, reinterpret_cast<T*>(out));
}

#define MNV4_OPS_FOR(T)                                                                                               \
  template void run_ops(const BasicOps<T>&, BasicPlans<T>*, Address, int, int, int, const Strides&, Address, Address, \
                        int, double*);                                                                                \
  template void run_program(const BasicPyProgram<T>&, Address, int, int, int, const Strides&, Address, int);
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

}  // namespace mnv4
