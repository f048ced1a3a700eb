// What torch says of a tensor, read without a Python object in between. Everything is found at run time and used only
// if it gives the answers of torch's own attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

namespace mnv4 {

namespace py = pybind11;

bool read_version(PyObject* t, std::int64_t& out);  // false: an inference tensor has none
bool read_data_ptr(PyObject* t, std::uintptr_t& out);
PyObject* read_dtype(PyObject* t);  // borrowed: there is one object for each dtype
bool read_requires_grad(PyObject* t);
PyTypeObject* tensor_type();
inline bool is_tensor(PyObject* t) { return PyObject_TypeCheck(t, tensor_type()) != 0; }

template <class T>
T load_at(const void* base, std::size_t at) {
  T v;
  std::memcpy(&v, static_cast<const char*>(base) + at, sizeof v);
  return v;
}

/// Where a tensor object keeps the word that says its dtype, found by trying: reading it costs a load, the attribute 20
/// ns. An equal word means an equal dtype; at another word the attribute is asked, and always where the trial fails.
struct DtypeWord {
  using Word = std::uint16_t;
  std::size_t impl_at = 0, word_at = 0;  // bytes; 0: not found

  const void* impl(PyObject* t) const { return load_at<const void*>(t, impl_at); }
  Word read(PyObject* t) const { return load_at<Word>(impl(t), word_at); }
  DtypeWord();
};
const DtypeWord& dtype_word();

/// torch's own functions behind _version and data_ptr(): 5 ns instead of 20. One is a C function of torch's stable
/// interface, the other a method without parameters. Both take the address of a tensor, which is one pointer to its
/// object. Used only if they give the attributes' answers; null otherwise.
struct TensorFunctions {
  std::int64_t (*version)(const void* const*) = nullptr;
  std::int32_t (*data_ptr)(const void* const*, void**) = nullptr;

  bool same(PyObject* t, bool versioned, std::int64_t v, std::uintptr_t address) const {
    const void* impl = dtype_word().impl(t);
    void* now = nullptr;
    try {
      return (!versioned || version(&impl) == v) && data_ptr(&impl, &now) == 0 &&
             reinterpret_cast<std::uintptr_t>(now) == address;
    } catch (...) {  // it has become an inference tensor
      return false;
    }
  }
  bool read(PyObject* t, std::int64_t& v, std::uintptr_t& address) const;
  TensorFunctions();
};
const TensorFunctions& tensor_functions();

/// Handle of a library of torch that is loaded ("libtorch_cpu.so"), or null.
void* torch_library(const char* name);

}  // namespace mnv4
