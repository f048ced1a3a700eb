#include "bindings/mqa.h"

#include "bindings/common.h"
#include "core/attention.h"

using namespace mnv4;

namespace {

Strided strided(Address a, const Strides& s) { return {const_cast<float*>(at(a)), s[0], s[1], s[2], s[3]}; }

void attention(Address q, const Strides& q_strides, Address k, const Strides& k_strides, Address v,
               const Strides& v_strides, Address out, const Strides& out_strides, int n, int heads, int nq, int nk,
               int key_dim, int value_dim, double scale, int threads) {
  require_least("attention", "n", n, 0);
  require_least("attention", "heads", heads, 1);
  require_least("attention", "nq", nq, 0);
  require_least("attention", "nk", nk, 1);
  require_least("attention", "key_dim", key_dim, 1);
  require_least("attention", "value_dim", value_dim, 1);
  require_least("attention", "threads", threads, 1);
  if (n == 0 || nq == 0) return;
  if (q == 0 || k == 0 || v == 0 || out == 0)
    throw std::invalid_argument("attention: q, k, v or out is 0, expected addresses");
  AttentionCall c;
  c.q = strided(q, q_strides), c.k = strided(k, k_strides), c.v = strided(v, v_strides);
  c.out = strided(out, out_strides);
  c.n = n, c.heads = heads, c.nq = nq, c.nk = nk, c.key_dim = key_dim, c.value_dim = value_dim;
  c.scale = static_cast<float>(scale);
  float* arena = scratch_arena().get(c.scratch_floats() * threads);
  py::gil_scoped_release release;
  c.run(active_kernels(), arena, threads);
}

}  // namespace

template <class T>
void bind_mqa(py::module_& m, const char* name) {
  using B = BasicMqa<T>;
  py::class_<B> bound(m, name);
  bound
      .def(py::init([](int c, int heads, int key_dim, int value_dim, int kv_kernel, int kv_stride, int query_stride,
                       bool norm, bool query_norm, const std::string& padding, bool residual) {
             MqaDesc d;
             d.c = c, d.heads = heads, d.key_dim = key_dim, d.value_dim = value_dim;
             d.kv_kernel = kv_kernel, d.kv_stride = kv_stride, d.query_stride = query_stride;
             d.norm = norm, d.query_norm = query_norm, d.residual = residual;
             d.same_padding = same_padding(padding, "MobileMQA");
             require_valid("MobileMQA", check(d));
             return std::make_unique<B>(d);
           }),
           py::kw_only(), py::arg("c"), py::arg("heads"), py::arg("key_dim"), py::arg("value_dim"),
           py::arg("kv_kernel") = 3, py::arg("kv_stride") = 1, py::arg("query_stride") = 1, py::arg("norm") = true,
           py::arg("query_norm") = false, py::arg("padding") = "symmetric", py::arg("residual") = true)
      .def(
          "pack",
          [](B& b, int stage, Address weight, Address bias, Address bn_weight, Address bn_bias, Address bn_mean,
             Address bn_var, double eps, Address gamma) {
            if (stage < 0 || stage >= kMqaStages || !b.has(static_cast<MqaStage>(stage))) {
              throw std::invalid_argument("MobileMQA.pack: stage = " + std::to_string(stage) +
                                          ", expected a stage that the block has");
            }
            const MqaStage s = static_cast<MqaStage>(stage);
            const StageParams p = stage_params(weight, bias, bn_weight, bn_bias, bn_mean, bn_var, eps, gamma,
                                               s == MqaStage::norm || s == MqaStage::query_norm);
            std::string wrong;
            {
              py::gil_scoped_release release;
              wrong = b.pack(s, p);
            }
            if (!wrong.empty())
              throw std::invalid_argument("MobileMQA.pack: stage = " + std::to_string(stage) + ", " + wrong);
          },
          py::arg("stage"), py::arg("weight") = 0, py::arg("bias") = 0, py::arg("bn_weight") = 0,
          py::arg("bn_bias") = 0, py::arg("bn_mean") = 0, py::arg("bn_var") = 0, py::arg("eps") = 0.0,
          py::arg("gamma") = 0)
      .def(
          "output_shape",
          [](const B& b, int n, int h, int w) {
            require_size("output_shape", n, h, w);
            require_valid("output_shape", refuses<T>({&b}, h, w));
            const MqaGeometry g = geometry(b.desc(), h, w);
            return py::make_tuple(n, b.desc().c, g.ho, g.wo);
          },
          py::arg("n"), py::arg("h"), py::arg("w"));
  bind_rest<T>(bound, 3);
}

#define MNV4_OPS_FOR(T) template void bind_mqa<T>(py::module_&, const char*);
MNV4_OPS_EACH_ELEMENT(MNV4_OPS_FOR)

void bind_attention(py::module_& m) {
  m.def("attention", &attention, py::arg("q"), py::arg("q_strides"), py::arg("k"), py::arg("k_strides"), py::arg("v"),
        py::arg("v_strides"), py::arg("out"), py::arg("out_strides"), py::arg("n"), py::arg("heads"), py::arg("nq"),
        py::arg("nk"), py::arg("key_dim"), py::arg("value_dim"), py::arg("scale"), py::arg("threads"));
}
