// mnv4_ops._core: blocks, heads and programs over raw addresses. Checks everything before any memory is touched.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/guard.h"
#include "core/cpu_features.h"
#include "core/parallel.h"
#include "core/program.h"

namespace py = pybind11;
using namespace mnv4;

namespace {

using Address = std::uintptr_t;
using Strides = std::array<std::ptrdiff_t, 4>;

const float* at(Address a) { return reinterpret_cast<const float*>(a); }

Act act_of(const std::string& name, const char* argument) {
  if (name == "none") return Act::none;
  if (name == "relu") return Act::relu;
  if (name == "relu6") return Act::relu6;
  if (name == "gelu") return Act::gelu;
  throw std::invalid_argument(std::string(argument) + " = '" + name + "', expected none, relu, relu6 or gelu");
}

void require_valid(const std::string& what, const std::string& message) {
  if (!message.empty()) throw std::invalid_argument(what + ": " + message);
}

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
thread_local Arena scratch_arena;
thread_local Arena input_arena;
constexpr std::size_t kKept = 1 << 20;

struct Blob {
  char magic[8];
  std::uint32_t version, op, dtype, tile;
  char isa[16];
  std::uint64_t floats;
  std::int32_t desc[16];
};
static_assert(sizeof(Blob) == 112);
constexpr char kMagic[8] = {'m', 'n', 'v', '4', 'p', 'a', 'c', 'k'};
constexpr std::uint32_t kBlobVersion = 1;

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
std::array<std::int32_t, 16> numbers(const HeadDesc& d) { return {d.c_in, d.c_feat, d.c_hidden, d.classes}; }

template <class T>
py::bytes export_blob(const T& op, std::uint32_t kind) {
  if (!op.packed()) throw std::runtime_error("export_blob: parameters are not packed yet");
  Blob b{};
  std::memcpy(b.magic, kMagic, sizeof kMagic);
  b.version = kBlobVersion, b.op = kind, b.dtype = 0, b.tile = kUnit;
  std::strncpy(b.isa, "any", sizeof b.isa - 1);  // units of 16 channels in every tier
  b.floats = op.blob_floats();
  const auto n = numbers(op.desc());
  std::memcpy(b.desc, n.data(), sizeof b.desc);
  std::string out(reinterpret_cast<const char*>(&b), sizeof b);
  out.append(reinterpret_cast<const char*>(op.blob()), op.blob_floats() * sizeof(float));
  return py::bytes(out);
}

template <class T>
void import_blob(T& op, std::uint32_t kind, const py::bytes& bytes) {
  char* p = nullptr;
  py::ssize_t size = 0;
  if (PyBytes_AsStringAndSize(bytes.ptr(), &p, &size) != 0) throw py::error_already_set();
  auto refuse = [](const std::string& what) { throw std::invalid_argument("import_blob: " + what); };
  Blob b;
  if (size < static_cast<py::ssize_t>(sizeof b))
    refuse("blob of " + std::to_string(size) + " bytes, expected at least " + std::to_string(sizeof b));
  std::memcpy(&b, p, sizeof b);
  if (std::memcmp(b.magic, kMagic, sizeof kMagic) != 0) refuse("blob does not start with the magic 'mnv4pack'");
  if (b.version != kBlobVersion)
    refuse("blob version " + std::to_string(b.version) + ", expected " + std::to_string(kBlobVersion));
  if (b.op != kind) refuse("blob of op kind " + std::to_string(b.op) + ", expected " + std::to_string(kind));
  if (b.dtype != 0) refuse("blob dtype " + std::to_string(b.dtype) + ", expected 0 (float32)");
  if (b.tile != kUnit || std::strncmp(b.isa, "any", sizeof b.isa) != 0) {
    refuse("blob tile " + std::to_string(b.tile) + " for ISA '" + std::string(b.isa, strnlen(b.isa, sizeof b.isa)) +
           "', expected 16 for 'any'");
  }
  const auto n = numbers(op.desc());
  if (std::memcmp(b.desc, n.data(), sizeof b.desc) != 0) refuse("blob was packed for another geometry");
  const std::size_t want = sizeof b + op.blob_floats() * sizeof(float);
  if (b.floats != op.blob_floats() || static_cast<std::size_t>(size) != want) {
    refuse("blob of " + std::to_string(size) + " bytes, expected " + std::to_string(want));
  }
  std::vector<float> copy(op.blob_floats());
  std::memcpy(copy.data(), p + sizeof b, copy.size() * sizeof(float));
  op.adopt(copy.data());
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

template <class T>
std::size_t scratch_bytes(const T& op, int h, int w, int threads) {
  require_size("scratch_bytes", 0, h, w);
  require_least("scratch_bytes", "threads", threads, 1);
  return op.scratch_floats(h, w, threads) * sizeof(float);
}

StageParams stage_params(Address weight, Address bias, Address bn_weight, Address bn_bias, Address bn_mean,
                         Address bn_var, double eps, Address gamma) {
  if (weight == 0) throw std::invalid_argument("pack: weight = 0, expected the address of a float32 array");
  if ((bn_mean == 0) != (bn_var == 0)) throw std::invalid_argument("pack: expected bn_mean and bn_var together");
  if ((bn_weight != 0 || bn_bias != 0) && bn_mean == 0)
    throw std::invalid_argument("pack: bn_weight or bn_bias without bn_mean and bn_var");
  if (!(eps >= 0.0)) throw std::invalid_argument("pack: eps = " + std::to_string(eps) + ", expected at least 0");
  return {at(weight), at(bias), at(bn_weight), at(bn_bias), at(bn_mean), at(bn_var), eps, at(gamma)};
}

// The plans of a list for the sizes it has met. Used under the GIL only.
class Plans {
 public:
  std::shared_ptr<const ProgramPlan> get(const std::vector<Op>& ops, int n, int h, int w, int threads) {
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

void run_ops(const std::vector<Op>& ops, Plans* plans, Address x, int n, int h, int w, const Strides& s, Address out,
             Address workspace, int threads, double* seconds = nullptr) {
  for (const Op& op : ops) {
    const bool packed = std::visit([](auto* p) { return p->packed(); }, op);
    if (!packed) throw std::runtime_error("run: a stage has no packed parameters, call pack() for each stage first");
  }
  require_size("run", n, h, w);
  require_least("run", "threads", threads, 1);
  if (n == 0) return;
  Plans none;
  const std::shared_ptr<const ProgramPlan> plan = (plans != nullptr ? *plans : none).get(ops, n, h, w, threads);
  if (workspace == 0 && plan->workspace() > 0) {
    throw std::invalid_argument("run: workspace = 0, expected the address of workspace_bytes() of memory");
  }
  if (x == 0 || out == 0) throw std::invalid_argument("run: x or out is 0, expected addresses");
  float* arena = scratch_arena.get(plan->scratch * threads);
  Tensor in = strided_tensor(const_cast<float*>(at(x)), s[0], s[1], s[2], s[3]);
  const Block* const* first = std::get_if<const Block*>(&ops[0]);
  const int c = first != nullptr ? (*first)->desc().c_in : std::get<const Head*>(ops[0])->desc().c_in;
  const bool any = first != nullptr && (*first)->any_channel_stride() && !(*first)->desc().residual;
  float* copy = nullptr;
  Arena large;  // a copy of more than kKept floats lives for this call only
  if (!any && s[1] != 1 && c > 1) {
    const std::size_t need = static_cast<std::size_t>(n) * c * h * w;
    copy = (need > kKept ? large : input_arena).get(need);
  }

  py::gil_scoped_release release;
  if (copy != nullptr) {
    // one pass to channels_last for a block whose first product reads whole pixels
    struct Job {
      const float* src;
      float* dst;
      Strides s;
      int n, c, h, w;
    } job{at(x), copy, s, n, c, h, w};
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
    in = strided_tensor(copy, row * h, 1, row, c);
  }
  if (c == 1) in.image.chan = 1, in.image.unit = kUnit;
  run(ops, *plan, active_kernels(), in, reinterpret_cast<float*>(out), reinterpret_cast<float*>(workspace), arena,
      seconds);
}

// Program keeps the Python objects of its ops alive.
struct PyProgram {
  std::vector<Op> ops;
  mutable Plans plans;
  py::list keep;
};

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

  py::class_<Block>(m, "Block")
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
             if (padding != "symmetric" && padding != "same") {
               throw std::invalid_argument("Block: padding = '" + padding + "', expected symmetric or same");
             }
             d.same_padding = padding == "same";
             d.act[0] = act_of(start_act, "Block: start_act");
             d.act[1] = act_of(expand_act, "Block: expand_act");
             d.act[2] = act_of(mid_act, "Block: mid_act");
             d.act[3] = act_of(project_act, "Block: project_act");
             require_valid("Block", check(d));
             return std::make_unique<Block>(d);
           }),
           py::kw_only(), py::arg("c_in"), py::arg("c_mid"), py::arg("c_out"), py::arg("start_kernel") = 0,
           py::arg("start_stride") = 1, py::arg("start_act") = "none", py::arg("expand") = false,
           py::arg("expand_kernel") = 1, py::arg("expand_stride") = 1, py::arg("expand_act") = "none",
           py::arg("mid_kernel") = 0, py::arg("mid_stride") = 1, py::arg("mid_act") = "none",
           py::arg("project") = false, py::arg("project_act") = "none", py::arg("residual") = false,
           py::arg("padding") = "symmetric")
      .def(
          "pack",
          [](Block& b, int stage, Address weight, Address bias, Address bn_weight, Address bn_bias, Address bn_mean,
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
          [](const Block& b, int n, int h, int w) {
            require_size("output_shape", n, h, w);
            const Geometry g = geometry(b.desc(), h, w);
            return py::make_tuple(n, b.desc().c_out, g.h2, g.w2);
          },
          py::arg("n"), py::arg("h"), py::arg("w"))
      .def(
          "run",
          [](const Block& b, Address x, int n, int h, int w, const Strides& strides, Address out, int threads) {
            run_ops({&b}, nullptr, x, n, h, w, strides, out, 0, threads);
          },
          py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("strides"), py::arg("out"),
          py::arg("threads"))
      .def("scratch_bytes", &scratch_bytes<Block>, py::arg("h"), py::arg("w"), py::arg("threads") = 1)
      .def_property_readonly("packed_bytes", [](const Block& b) { return b.blob_floats() * sizeof(float); })
      .def("export_blob", [](const Block& b) { return export_blob(b, 1); })
      .def("import_blob", [](Block& b, const py::bytes& blob) { import_blob(b, 1, blob); }, py::arg("blob"));

  py::class_<Head>(m, "Head")
      .def(py::init([](int c_in, int c_feat, const std::string& feat_act, int c_hidden, const std::string& hidden_act,
                       int classes) {
             HeadDesc d;
             d.c_in = c_in, d.c_feat = c_feat, d.c_hidden = c_hidden, d.classes = classes;
             d.feat_act = act_of(feat_act, "Head: feat_act"), d.hidden_act = act_of(hidden_act, "Head: hidden_act");
             require_valid("Head", check(d));
             return std::make_unique<Head>(d);
           }),
           py::kw_only(), py::arg("c_in"), py::arg("c_feat") = 0, py::arg("feat_act") = "none", py::arg("c_hidden") = 0,
           py::arg("hidden_act") = "none", py::arg("classes") = 0)
      .def(
          "pack",
          [](Head& b, int stage, Address weight, Address bias, Address bn_weight, Address bn_bias, Address bn_mean,
             Address bn_var, double eps, Address gamma) {
            const StageParams p = stage_params(weight, bias, bn_weight, bn_bias, bn_mean, bn_var, eps, gamma);
            py::gil_scoped_release release;
            if (!b.pack(stage, p))
              throw std::invalid_argument("Head.pack: stage = " + std::to_string(stage) +
                                          ", expected a stage that the head has");
          },
          py::arg("stage"), py::arg("weight"), py::arg("bias") = 0, py::arg("bn_weight") = 0, py::arg("bn_bias") = 0,
          py::arg("bn_mean") = 0, py::arg("bn_var") = 0, py::arg("eps") = 0.0, py::arg("gamma") = 0)
      .def("output_features", &Head::features)
      .def(
          "run",
          [](const Head& b, Address x, int n, int h, int w, const Strides& strides, Address out, int threads) {
            run_ops({&b}, nullptr, x, n, h, w, strides, out, 0, threads);
          },
          py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("strides"), py::arg("out"),
          py::arg("threads"))
      .def("scratch_bytes", &scratch_bytes<Head>, py::arg("h"), py::arg("w"), py::arg("threads") = 1)
      .def_property_readonly("packed_bytes", [](const Head& b) { return b.blob_floats() * sizeof(float); })
      .def("export_blob", [](const Head& b) { return export_blob(b, 2); })
      .def("import_blob", [](Head& b, const py::bytes& blob) { import_blob(b, 2, blob); }, py::arg("blob"));

  py::class_<PyProgram> program(m, "Program");
  program
      .def(py::init([](const py::list& ops) {
             auto p = std::make_unique<PyProgram>();
             for (const py::handle& op : ops) {
               if (py::isinstance<Block>(op)) {
                 p->ops.emplace_back(op.cast<const Block*>());
               } else if (py::isinstance<Head>(op)) {
                 p->ops.emplace_back(op.cast<const Head*>());
               } else {
                 throw std::invalid_argument("Program: ops holds a " + std::string(py::str(py::type::of(op))) +
                                             ", expected Block or Head");
               }
             }
             require_valid("Program", check(p->ops));
             p->keep = py::list(ops);
             return p;
           }),
           py::arg("ops"))
      .def(
          "output_shape",
          [](const PyProgram& p, int n, int h, int w) -> py::tuple {
            require_size("output_shape", n, h, w);
            const Shape s = output_shape(p.ops, n, h, w);
            if (s.h == 0) return py::make_tuple(s.n, s.c);
            return py::make_tuple(s.n, s.c, s.h, s.w);
          },
          py::arg("n"), py::arg("h"), py::arg("w"))
      .def(
          "workspace_bytes",
          [](const PyProgram& p, int n, int h, int w, int threads) {
            require_size("workspace_bytes", n, h, w);
            require_least("workspace_bytes", "threads", threads, 1);
            return p.plans.get(p.ops, n, h, w, threads)->workspace() * sizeof(float);
          },
          py::arg("n"), py::arg("h"), py::arg("w"), py::arg("threads") = 1)
      .def(
          "scratch_bytes",
          [](const PyProgram& p, int h, int w, int threads) {
            require_size("scratch_bytes", 0, h, w);
            require_least("scratch_bytes", "threads", threads, 1);
            return plan_program(p.ops, 1, h, w, threads).scratch * sizeof(float);
          },
          py::arg("h"), py::arg("w"), py::arg("threads") = 1)
      .def(
          "run",
          [](const PyProgram& p, Address x, int n, int h, int w, const Strides& strides, Address out, Address workspace,
             int threads) { run_ops(p.ops, &p.plans, x, n, h, w, strides, out, workspace, threads); },
          py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("strides"), py::arg("out"),
          py::arg("workspace"), py::arg("threads"));

  program.def(
      "profile",
      [](const PyProgram& p, Address x, int n, int h, int w, const Strides& strides, Address out, Address workspace,
         int threads) {
        std::vector<double> seconds(p.ops.size(), 0.0);
        run_ops(p.ops, &p.plans, x, n, h, w, strides, out, workspace, threads, seconds.data());
        return seconds;
      },
      py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("strides"), py::arg("out"), py::arg("workspace"),
      py::arg("threads"));

  bind_guard(m);
}
