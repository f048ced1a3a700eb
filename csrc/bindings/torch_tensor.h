// What torch says of a tensor, read without a Python object in between. Everything is found at run time and used only
// if it gives the answers of torch's own attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <utility>

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

/// A context manager of Python's, entered for as long as this lives.
class Inside {
 public:
  explicit Inside(py::object context) : context_(std::move(context)) { context_.attr("__enter__")(); }
  ~Inside() {
    try {
      context_.attr("__exit__")(py::none(), py::none(), py::none());
    } catch (py::error_already_set& e) {
      e.discard_as_unraisable("leaving a context of torch");
    }
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  py::object context_;
};

/// What a trial says; false where it raises: what cannot be tried is not used.
template <class F>
bool holds(F trial) {
  try {
    return trial();
  } catch (py::error_already_set& e) {
    if (!e.matches(PyExc_Exception)) throw;  // an interrupt says nothing
  } catch (const std::exception&) {
  }
  return false;
}

/// The T of this process, made at first use. No lock: T() runs Python, which may let another thread come here, and that
/// one would wait with the GIL in its hands. If two make one, the first stays.
template <class T>
const T& made_once() {
  static std::atomic<const T*> made{nullptr};
  if (const T* t = made.load(std::memory_order_acquire)) return *t;
  auto mine = std::make_unique<const T>();
  const T* first = nullptr;
  if (made.compare_exchange_strong(first, mine.get(), std::memory_order_acq_rel)) return *mine.release();
  return *first;
}

// bytes of what a tensor object refers to, where its dtype and dispatch keys are looked for: the end is its least size
inline constexpr std::size_t kImplFrom = 64, kImplBytes = 176;

/// Where a tensor object keeps the word that says its dtype, found by trying: reading it costs a load, the attribute 20
/// ns. An equal word means an equal dtype; at another word the attribute is asked, and always where the trial fails.
struct DtypeWord {
  using Word = std::uint16_t;
  std::size_t impl_at = 0, word_at = 0;  // bytes; 0: not found

  const void* impl(PyObject* t) const { return load_at<const void*>(t, impl_at); }
  Word read(PyObject* t) const { return load_at<Word>(impl(t), word_at); }
  DtypeWord();

 private:
  bool find();
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

 private:
  bool find();
};
const TensorFunctions& tensor_functions();

/// Handle of a library of torch that is loaded ("libtorch_cpu.so"), or null.
void* torch_library(const char* name);
/// A function or a variable of such a library, or null.
void* torch_symbol(void* library, const char* name);
/// The same as the pointer that it is; false: there is none.
template <class F>
bool find_symbol(F& f, void* library, const char* name) {
  f = reinterpret_cast<F>(torch_symbol(library, name));
  return f != nullptr;
}

}  // namespace mnv4
