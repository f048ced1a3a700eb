// What the bindings of all operations share: checks of arguments, scratch, packed blobs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/call.h"

namespace mnv4 {

namespace py = pybind11;
using Address = std::uintptr_t;

inline const float* at(Address a) { return reinterpret_cast<const float*>(a); }

void require_valid(const std::string& what, const std::string& message);
void require_least(const char* where, const char* name, int value, int least);
void require_size(const char* where, int n, int h, int w);
/// True for "same", false for "symmetric".
bool same_padding(const std::string& padding, const char* cls);

struct Blob {
  char magic[8];
  std::uint32_t version, op, dtype, tile;
  char isa[16];
  std::uint64_t floats;
  std::int32_t desc[16];
};
static_assert(sizeof(Blob) == 112);
inline constexpr char kMagic[8] = {'m', 'n', 'v', '4', 'p', 'a', 'c', 'k'};
inline constexpr std::uint32_t kBlobVersion = 1;

std::array<std::int32_t, 16> numbers(const BlockDesc& d);
std::array<std::int32_t, 16> numbers(const HeadDesc& d);
std::array<std::int32_t, 16> numbers(const MqaDesc& d);

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
    std::string isa(b.isa, strnlen(b.isa, sizeof b.isa));
    for (char& c : isa) {
      if (c < ' ' || c > '~') c = '?';  // a message has to be UTF-8
    }
    refuse("blob tile " + std::to_string(b.tile) + " for ISA '" + isa + "', expected 16 for 'any'");
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

template <class T, class B>
std::size_t scratch_bytes(const B& op, int h, int w, int threads) {
  require_size("scratch_bytes", 0, h, w);
  require_least("scratch_bytes", "threads", threads, 1);
  return op.scratch_floats(h, w, threads) * sizeof(T);
}

/// Checked: addresses go together as StageParams says; `bare`: a norm without a weight.
StageParams stage_params(Address weight, Address bias, Address bn_weight, Address bn_bias, Address bn_mean,
                         Address bn_var, double eps, Address gamma, bool bare = false);

/// Runs a list in the caller's workspace. Checked; strides in elements.
template <class T>
void run_ops(const BasicOps<T>& ops, BasicPlans<T>* plans, Address x, int n, int h, int w, const Strides& s,
             Address out, Address workspace, int threads, double* seconds = nullptr);

/// What all operations have alike; blobs are of float32, of kind `kind`.
template <class T, class B>
void bind_rest(py::class_<B>& bound, std::uint32_t kind) {
  bound
      .def(
          "run",
          [](const B& b, Address x, int n, int h, int w, const Strides& strides, Address out, int threads) {
            run_ops<T>({&b}, nullptr, x, n, h, w, strides, out, 0, threads);
          },
          py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("strides"), py::arg("out"),
          py::arg("threads"))
      .def("scratch_bytes", &scratch_bytes<T, B>, py::arg("h"), py::arg("w"), py::arg("threads") = 1)
      .def_property_readonly("packed_bytes", [](const B& b) { return b.blob_floats() * sizeof(float); });
  if constexpr (std::is_same_v<T, float>) {
    bound.def("export_blob", [kind](const B& b) { return export_blob(b, kind); })
        .def("import_blob", [kind](B& b, const py::bytes& blob) { import_blob(b, kind, blob); }, py::arg("blob"));
  }
}

// Program keeps the Python objects of its ops alive. Its plans are asked for under the GIL.
template <class T>
struct BasicPyProgram {
  BasicOps<T> ops;
  mutable BasicPlans<T> plans;
  py::list keep;
};
using PyProgram = BasicPyProgram<float>;
/// The same in memory of the calling thread, see forward.
template <class T>
void run_program(const BasicPyProgram<T>& p, Address x, int n, int h, int w, const Strides& s, Address out,
                 int threads);

}  // namespace mnv4
