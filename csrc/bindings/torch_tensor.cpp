#include "bindings/torch_tensor.h"

#include <string>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace mnv4 {
namespace {

// the C functions behind torch.Tensor's attributes; going through them skips the attribute look-up
struct TensorApi {
  PyTypeObject* type = nullptr;
  PyGetSetDef* version = nullptr;
  PyGetSetDef* requires_grad = nullptr;
  PyGetSetDef* dtype = nullptr;
  PyCFunction data_ptr = nullptr;

  static PyGetSetDef* getset(const py::object& type, const char* name) {
    py::object d = type.attr(name);
    if (Py_TYPE(d.ptr()) != &PyGetSetDescr_Type) return nullptr;
    return reinterpret_cast<PyGetSetDescrObject*>(d.ptr())->d_getset;
  }
  TensorApi() {
    py::object tensor = py::module_::import("torch").attr("Tensor");
    version = getset(tensor, "_version");
    requires_grad = getset(tensor, "requires_grad");
    dtype = getset(tensor, "dtype");
    py::object d = tensor.attr("data_ptr");
    if (Py_TYPE(d.ptr()) == &PyMethodDescr_Type) {
      PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(d.ptr())->d_method;
      if (def->ml_flags == METH_NOARGS) data_ptr = def->ml_meth;
    }
    type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  }
};

const TensorApi& tensor_api() { return made_once<TensorApi>(); }

// new reference, null with an error set
PyObject* get(PyGetSetDef* def, PyObject* t, const char* name) {
  return def ? def->get(t, def->closure) : PyObject_GetAttrString(t, name);
}

}  // namespace

bool read_version(PyObject* t, std::int64_t& out) {
  PyObject* v = get(tensor_api().version, t, "_version");
  if (!v) return PyErr_Clear(), false;  // an inference tensor has none
  out = PyLong_AsLongLong(v);
  Py_DECREF(v);
  return true;
}

bool read_data_ptr(PyObject* t, std::uintptr_t& out) {
  const TensorApi& api = tensor_api();
  PyObject* v = api.data_ptr ? api.data_ptr(t, nullptr) : PyObject_CallMethod(t, "data_ptr", nullptr);
  if (!v) return PyErr_Clear(), false;
  out = reinterpret_cast<std::uintptr_t>(PyLong_AsVoidPtr(v));
  Py_DECREF(v);
  return true;
}

PyObject* read_dtype(PyObject* t) {
  PyObject* v = get(tensor_api().dtype, t, "dtype");
  if (!v) return PyErr_Clear(), nullptr;
  Py_DECREF(v);
  return v;
}

bool read_requires_grad(PyObject* t) {
  PyObject* v = get(tensor_api().requires_grad, t, "requires_grad");
  if (!v) return PyErr_Clear(), true;
  const bool yes = v == Py_True;
  Py_DECREF(v);
  return yes;
}

PyTypeObject* tensor_type() { return tensor_api().type; }

void* torch_library(const char* name) {
#if defined(__linux__)
  const std::string path = py::cast<std::string>(py::module_::import("torch").attr("__file__"));
  return dlopen((path.substr(0, path.rfind('/')) + "/lib/" + name).c_str(), RTLD_LAZY | RTLD_NOLOAD);
#else
  (void)name;
  return nullptr;
#endif
}

void* torch_symbol([[maybe_unused]] void* library, [[maybe_unused]] const char* name) {
#if defined(__linux__)
  return library == nullptr ? nullptr : dlsym(library, name);
#else
  return nullptr;
#endif
}

DtypeWord::DtypeWord() {
  if (!holds([this] { return find(); })) impl_at = word_at = 0;
}

bool DtypeWord::find() {
  if (sizeof(void*) != 8) return false;
  py::module_ torch = py::module_::import("torch");
  std::vector<py::object> tensors;
  // two of each dtype and of different sizes
  for (const char* name : {"float32", "float16", "bfloat16", "float64", "int32", "int64", "int8", "uint8"})
    for (int size : {1, 3}) tensors.push_back(torch.attr("zeros")(size, py::arg("dtype") = torch.attr(name)));
  const auto size = static_cast<std::size_t>(Py_TYPE(tensors[0].ptr())->tp_basicsize);
  std::size_t found = 0;
  for (std::size_t at = sizeof(PyObject); !found && at + 8 <= size; at += 8) {
    bool all = true;
    for (const py::object& t : tensors)
      all = all && load_at<std::uint64_t>(t.ptr(), at) == t.attr("_cdata").cast<std::uint64_t>();
    if (all) found = at;
  }
  if (!found) return false;
  impl_at = found;
  for (std::size_t at = kImplFrom; at + sizeof(Word) <= kImplBytes; at += sizeof(Word)) {
    word_at = at;
    bool good = true;
    for (std::size_t i = 0; good && i < tensors.size(); ++i)
      for (std::size_t j = 0; good && j < i; ++j)
        good = (read(tensors[i].ptr()) == read(tensors[j].ptr())) == (i / 2 == j / 2);
    py::object t = tensors[0];
    const Word before = read(t.ptr());
    t.attr("data") = t.attr("data").attr("view")(torch.attr("int32"));
    good = good && read(t.ptr()) != before;
    t.attr("data") = t.attr("data").attr("view")(torch.attr("float32"));
    if (good && read(t.ptr()) == before) return true;
  }
  return false;
}

const DtypeWord& dtype_word() { return made_once<DtypeWord>(); }

bool TensorFunctions::read(PyObject* t, std::int64_t& v, std::uintptr_t& address) const {
  const void* impl = dtype_word().impl(t);
  void* now = nullptr;
  try {
    v = version(&impl);
  } catch (...) {  // an inference tensor
    v = -1;
  }
  if (data_ptr(&impl, &now) != 0) return false;
  address = reinterpret_cast<std::uintptr_t>(now);
  return true;
}

TensorFunctions::TensorFunctions() {
  if (!holds([this] { return find(); })) version = nullptr, data_ptr = nullptr;
}

bool TensorFunctions::find() {
  if (!dtype_word().impl_at) return false;
  void* library = torch_library("libtorch_cpu.so");
  if (!find_symbol(version, library, "_ZNK2at10TensorBase8_versionEv")) return false;
  if (!find_symbol(data_ptr, library, "aoti_torch_get_data_ptr")) return false;
  py::module_ torch = py::module_::import("torch");
  const Inside ordinary(torch.attr("inference_mode")(false));  // the first call may come from inside of it
  bool good = true;
  for (int i = 0; good && i < 8; ++i) {
    py::object t = torch.attr("zeros")(i + 2)[py::slice(i, i + 2, 1)];
    for (int j = 0; j <= i; ++j) t.attr("zero_")();
    std::int64_t v = 0;
    std::uintptr_t a = 0;
    good = read_version(t.ptr(), v) && v > i && read_data_ptr(t.ptr(), a) && same(t.ptr(), true, v, a) &&
           !same(t.ptr(), true, v + 1, a) && !same(t.ptr(), true, v, a + 4);
  }
  return good;
}

const TensorFunctions& tensor_functions() { return made_once<TensorFunctions>(); }

}  // namespace mnv4
