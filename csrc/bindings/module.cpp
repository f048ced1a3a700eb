// mnv4_ops._core: blocks, heads and programs over raw addresses. Checks everything before any memory is touched.
#include <algorithm>
#include <chrono>

#include "bindings/common.h"
#include "bindings/guard.h"
#include "bindings/lane.h"
#include "bindings/mqa.h"
#include "core/cpu_features.h"
#include "core/parallel.h"

using namespace mnv4;

namespace {

Act act_of(const std::string& name, const char* argument) {
  if (name == "none") return Act::none;
  if (name == "relu") return Act::relu;
  if (name == "relu6") return Act::relu6;
  if (name == "gelu") return Act::gelu;
  throw std::invalid_argument(std::string(argument) + " = '" + name + "', expected none, relu, relu6 or gelu");
}

py::dict cpu_dict() {
  const CpuInfo& c = cpu_info();
  const KernelTable* tiers[8] = {};
  const int n = available_tiers(tiers, 8);
  py::list names;
  for (int i = 0; i < n; ++i) names.append(tiers[i]->name);
  py::dict d;
  d["model"] = c.model, d["features"] = c.features, d["l1d"] = c.l1d, d["l2"] = c.l2, d["l3"] = c.l3;
  d["tiers"] = names, d["tier"] = active_kernels().name;
  return d;
}

py::dict build_dict() {
  py::list tiers;
  tiers.append("scalar");
#if defined(MNV4_OPS_HAVE_AVX2)
  tiers.append("avx2");
#endif
#if defined(MNV4_OPS_HAVE_AVX512)
  tiers.append("avx512");
#endif
#if defined(MNV4_OPS_HAVE_NEON)
  tiers.append("neon");
#endif
#if defined(MNV4_OPS_HALF)
  tiers.append("neon_fp16");
  tiers.append("neon_bf16");
#endif
  py::dict d;
  d["version"] = MNV4_OPS_VERSION, d["compiler"] = __VERSION__, d["tiers"] = tiers;
  return d;
}

void set_tier(const std::string& name) {
  if (force_tier(name.c_str())) return;
  const KernelTable* tiers[8] = {};
  const int n = available_tiers(tiers, 8);
  std::string have;
  for (int i = 0; i < n; ++i) have += (i > 0 ? ", " : "") + std::string(tiers[i]->name);
  throw std::invalid_argument("set_tier: name = '" + name + "', expected one that this machine has: " + have);
}

// Best GFLOP/s of a register-only multiply-add loop on `threads` threads at once.
double fma_peak(int threads, double seconds) {
  if (threads < 1)
    throw std::invalid_argument("fma_peak: threads = " + std::to_string(threads) + ", expected at least 1");
  py::gil_scoped_release release;
  struct Job {
    const KernelTable* k;
    double seconds;
    std::vector<double> rate;
  } job{&active_kernels(), seconds, std::vector<double>(threads, 0.0)};
  parallel_run(
      threads,
      [](void* p, int tid, int) {
        Job& j = *static_cast<Job*>(p);
        using clock = std::chrono::steady_clock;
        const auto end = clock::now() + std::chrono::duration<double>(j.seconds);
        while (clock::now() < end) {
          const auto t0 = clock::now();
          const double flops = j.k->fma_burst(20000);
          const double t = std::chrono::duration<double>(clock::now() - t0).count();
          j.rate[tid] = std::max(j.rate[tid], flops / t * 1e-9);
        }
      },
      &job);
  double sum = 0.0;
  for (double r : job.rate) sum += r;
  return sum;
}

template <class T>
void bind_block(py::module_& m, const char* name) {
  using B = BasicBlock<T>;
  py::class_<B> bound(m, name);
  bound
      .def(py::init([](int c_in, int c_mid, int c_out, int start_kernel, int start_stride, const std::string& start_act,
                       bool expand, int expand_kernel, int expand_stride, const std::string& expand_act, int mid_kernel,
                       int mid_stride, const std::string& mid_act, bool project, const std::string& project_act,
                       bool residual, const std::string& padding) {
             BlockDesc d;
             d.c_in = c_in, d.c_mid = c_mid, d.c_out = c_out;
             d.start_kernel = start_kernel, d.start_stride = start_stride;
             d.expand = expand, d.expand_kernel = expand_kernel, d.expand_stride = expand_stride;
             d.mid_kernel = mid_kernel, d.mid_stride = mid_stride;
             d.project = project, d.residual = residual;
             d.same_padding = same_padding(padding, "Block");
             d.act[0] = act_of(start_act, "Block: start_act");
             d.act[1] = act_of(expand_act, "Block: expand_act");
             d.act[2] = act_of(mid_act, "Block: mid_act");
             d.act[3] = act_of(project_act, "Block: project_act");
             require_valid("Block", check(d));
             return std::make_unique<B>(d);
           }),
           py::kw_only(), py::arg("c_in"), py::arg("c_mid"), py::arg("c_out"), py::arg("start_kernel") = 0,
           py::arg("start_stride") = 1, py::arg("start_act") = "none", py::arg("expand") = false,
           py::arg("expand_kernel") = 1, py::arg("expand_stride") = 1, py::arg("expand_act") = "none",
           py::arg("mid_kernel") = 0, py::arg("mid_stride") = 1, py::arg("mid_act") = "none",
           py::arg("project") = false, py::arg("project_act") = "none", py::arg("residual") = false,
           py::arg("padding") = "symmetric")
      .def(
          "pack",
          [](B& b, int stage, Address weight, Address bias, Address bn_weight, Address bn_bias, Address bn_mean,
             Address bn_var, double eps, Address gamma) {
            const StageParams p = stage_params(weight, bias, bn_weight, bn_bias, bn_mean, bn_var, eps, gamma);
            if (stage < 0 || stage >= kStages || !b.has(static_cast<Stage>(stage))) {
              throw std::invalid_argument("Block.pack: stage = " + std::to_string(stage) +
                                          ", expected a stage that the block has");
            }
            py::gil_scoped_release release;
            if (!b.pack(static_cast<Stage>(stage), p)) throw std::bad_alloc();
          },
          py::arg("stage"), py::arg("weight"), py::arg("bias") = 0, py::arg("bn_weight") = 0, py::arg("bn_bias") = 0,
          py::arg("bn_mean") = 0, py::arg("bn_var") = 0, py::arg("eps") = 0.0, py::arg("gamma") = 0)
      .def(
          "output_shape",
          [](const B& b, int n, int h, int w) {
            require_size("output_shape", n, h, w);
            const Geometry g = geometry(b.desc(), h, w);
            return py::make_tuple(n, b.desc().c_out, g.h2, g.w2);
          },
          py::arg("n"), py::arg("h"), py::arg("w"));
  bind_rest<T>(bound, 1);
}

template <class T>
void bind_head(py::module_& m, const char* name) {
  using B = BasicHead<T>;
  py::class_<B> bound(m, name);
  bound
      .def(py::init([](int c_in, int c_feat, const std::string& feat_act, int c_hidden, const std::string& hidden_act,
                       int classes) {
             HeadDesc d;
             d.c_in = c_in, d.c_feat = c_feat, d.c_hidden = c_hidden, d.classes = classes;
             d.feat_act = act_of(feat_act, "Head: feat_act"), d.hidden_act = act_of(hidden_act, "Head: hidden_act");
             require_valid("Head", check(d));
             return std::make_unique<B>(d);
           }),
           py::kw_only(), py::arg("c_in"), py::arg("c_feat") = 0, py::arg("feat_act") = "none", py::arg("c_hidden") = 0,
           py::arg("hidden_act") = "none", py::arg("classes") = 0)
      .def(
          "pack",
          [](B& b, int stage, Address weight, Address bias, Address bn_weight, Address bn_bias, Address bn_mean,
             Address bn_var, double eps, Address gamma) {
            const StageParams p = stage_params(weight, bias, bn_weight, bn_bias, bn_mean, bn_var, eps, gamma);
            py::gil_scoped_release release;
            if (!b.pack(stage, p))
              throw std::invalid_argument("Head.pack: stage = " + std::to_string(stage) +
                                          ", expected a stage that the head has");
          },
          py::arg("stage"), py::arg("weight"), py::arg("bias") = 0, py::arg("bn_weight") = 0, py::arg("bn_bias") = 0,
          py::arg("bn_mean") = 0, py::arg("bn_var") = 0, py::arg("eps") = 0.0, py::arg("gamma") = 0)
      .def("output_features", &B::features);
  bind_rest<T>(bound, 2);
}

template <class T>
void bind_program(py::module_& m, const char* name) {
  using P = BasicPyProgram<T>;
  py::class_<P>(m, name)
      .def(py::init([](const py::list& ops) {
             auto p = std::make_unique<P>();
             for (const py::handle& op : ops) {
               if (py::isinstance<BasicBlock<T>>(op)) {
                 p->ops.emplace_back(op.cast<const BasicBlock<T>*>());
               } else if (py::isinstance<BasicHead<T>>(op)) {
                 p->ops.emplace_back(op.cast<const BasicHead<T>*>());
               } else if (py::isinstance<BasicMqa<T>>(op)) {
                 p->ops.emplace_back(op.cast<const BasicMqa<T>*>());
               } else {
                 throw std::invalid_argument("Program: ops holds a " + std::string(py::str(py::type::of(op))) +
                                             ", expected Block, MobileMQA or Head");
               }
             }
             require_valid("Program", check<T>(p->ops));
             p->keep = py::list(ops);
             return p;
           }),
           py::arg("ops"))
      .def(
          "output_shape",
          [](const P& p, int n, int h, int w) -> py::tuple {
            require_size("output_shape", n, h, w);
            require_valid("output_shape", refuses<T>(p.ops, h, w));
            const Shape s = output_shape<T>(p.ops, n, h, w);
            if (s.h == 0) return py::make_tuple(s.n, s.c);
            return py::make_tuple(s.n, s.c, s.h, s.w);
          },
          py::arg("n"), py::arg("h"), py::arg("w"))
      .def(
          "workspace_bytes",
          [](const P& p, int n, int h, int w, int threads) {
            require_size("workspace_bytes", n, h, w);
            require_least("workspace_bytes", "threads", threads, 1);
            return p.plans.get(p.ops, n, h, w, threads)->workspace() * sizeof(T);
          },
          py::arg("n"), py::arg("h"), py::arg("w"), py::arg("threads") = 1)
      .def(
          "scratch_bytes",
          [](const P& p, int h, int w, int threads) {
            require_size("scratch_bytes", 0, h, w);
            require_least("scratch_bytes", "threads", threads, 1);
            return plan_program<T>(p.ops, 1, h, w, threads).scratch * sizeof(T);
          },
          py::arg("h"), py::arg("w"), py::arg("threads") = 1)
      .def(
          "run",
          [](const P& p, Address x, int n, int h, int w, const Strides& strides, Address out, Address workspace,
             int threads) { run_ops<T>(p.ops, &p.plans, x, n, h, w, strides, out, workspace, threads); },
          py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("strides"), py::arg("out"),
          py::arg("workspace"), py::arg("threads"))
      .def("forward", &run_program<T>, py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("strides"),
           py::arg("out"), py::arg("threads"))
      .def(
          "profile",
          [](const P& p, Address x, int n, int h, int w, const Strides& strides, Address out, Address workspace,
             int threads) {
            std::vector<double> seconds(p.ops.size(), 0.0);
            run_ops<T>(p.ops, &p.plans, x, n, h, w, strides, out, workspace, threads, seconds.data());
            return seconds;
          },
          py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("strides"), py::arg("out"),
          py::arg("workspace"), py::arg("threads"));
}

/// Blocks, attention blocks, heads and programs over elements T, where this machine has kernels for them.
template <class T>
void bind_elements(py::module_& m, const std::string& prefix) {
  if (kernels_for<T>() == nullptr) return;
  bind_block<T>(m, (prefix + "Block").c_str());
  bind_head<T>(m, (prefix + "Head").c_str());
  bind_mqa<T>(m, (prefix + "MobileMQA").c_str());
  bind_program<T>(m, (prefix + "Program").c_str());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  pool_buffers();
  m.doc() = "native kernels of mnv4_ops";
  m.def("cpu_info", &cpu_dict);
  m.def("build_info", &build_dict);
  m.def("set_tier", &set_tier, py::arg("name"));
  m.def("openmp_runtime", [] {
    const char* path = openmp_runtime_path();
    return path == nullptr ? py::object(py::none()) : py::object(py::str(path));
  });
  m.def("fma_peak", &fma_peak, py::arg("threads") = 1, py::arg("seconds") = 0.2);

  bind_elements<float>(m, "");
#if defined(MNV4_OPS_HALF)
  bind_elements<Half>(m, "Half");
  bind_elements<BFloat16>(m, "BFloat16");
#endif
  bind_attention(m);
  m.def("workspace_kept", [] { return workspace_kept() * sizeof(float); });
  m.attr("WORKSPACE_LIMIT") = kWorkspaceKept * sizeof(float);

  bind_guard(m);
  bind_lane(m);
}
