// Lane: what Python checks before a model's forward and does around the native call, for inputs like those it has seen
// go well, without Python. A forward sweeps the caches, so that the next call finds the interpreter, torch's argument
// parsers and each object it looks at in L3 or in memory: 100 us where a loop over the checks alone takes 10.
//
// What is compared is what was noted when all checks had passed: the thread's dispatch keys (they change under
// autocast, dispatch modes, functorch, tracing), the tensor's own (its device, layout, lazy negation, wrapping), dtype,
// sizes, strides. Anything else than equal is for the long way, which says why.
#include "bindings/lane.h"

#include <array>
#include <memory>
#include <vector>

#include "bindings/common.h"
#include "bindings/guard.h"
#include "bindings/torch_tensor.h"

using namespace mnv4;

namespace {

using Keys = std::array<std::uint64_t, 2>;
using Sizes = std::array<std::int64_t, 4>;

// Of an object behind a tensor: the word that holds its dispatch keys, found by trying.
std::size_t find_key_word() {
  const DtypeWord& dtype = dtype_word();
  if (!dtype.word_at) return 0;
  py::module_ torch = py::module_::import("torch");
  const py::object zeros = torch.attr("zeros");
  std::vector<py::object> plain, others;
  for (const char* name : {"float32", "float16", "int64"})
    for (int size : {1, 3}) plain.push_back(zeros(size, py::arg("dtype") = torch.attr(name)));
  plain.push_back(zeros(py::make_tuple(2, 3)).attr("t")());
  others.push_back(torch.attr("_neg_view")(plain[0]));
  others.push_back(zeros(1, py::arg("device") = "meta"));
  others.push_back(zeros(1).attr("to_sparse")());
  {
    const Inside mode(torch.attr("inference_mode")());
    others.push_back(zeros(1));
  }
  for (std::size_t at = kImplFrom; at + 8 <= kImplBytes; at += 8) {
    const auto word = [&](const py::object& t) { return load_at<std::uint64_t>(dtype.impl(t.ptr()), at); };
    bool good = word(plain[0]) != 0;
    for (const py::object& t : plain) good = good && word(t) == word(plain[0]);
    for (const py::object& t : others) good = good && word(t) != word(plain[0]);
    if (good) return at;
  }
  return 0;
}

// torch's own functions and variables behind what Python asks of the thread; all or none.
struct Torch {
  std::size_t keys_at = 0;
  void* c10 = nullptr;
  bool (*grad)() = nullptr;
  int (*threads)() = nullptr;
  bool (*callbacks)() = nullptr;  // of profilers
  std::int64_t (*function_modes)() = nullptr;
  std::int32_t (*dim)(const void* const*, std::int64_t*) = nullptr;
  std::int32_t (*sizes)(const void* const*, std::int64_t**) = nullptr;
  std::int32_t (*strides)(const void* const*, std::int64_t**) = nullptr;
  PyObject *empty = nullptr, *float32 = nullptr, *cpu = nullptr, *channels_last = nullptr;
  PyObject *row_names = nullptr, *image_names = nullptr;  // of the keywords of empty()
  bool found = false;

  const Keys* keys() const {
    thread_local const Keys* mine =
        static_cast<const Keys*>(torch_symbol(c10, "_ZN3c104impl26raw_local_dispatch_key_setE"));
    return mine;
  }

  bool read(const void* impl, int n, Sizes& size, Sizes& stride) const {
    std::int64_t *s = nullptr, *p = nullptr;
    if (sizes(&impl, &s) != 0 || strides(&impl, &p) != 0) return false;
    for (int i = 0; i < n; ++i) size[i] = s[i], stride[i] = p[i];
    return true;
  }

  Torch() : found(holds([this] { return find(); })) {}

 private:
  bool find() {
    if (tensor_functions().data_ptr == nullptr) return false;
    void* library = torch_library("libtorch_cpu.so");
    c10 = torch_library("libc10.so");
    const bool all = keys() != nullptr && find_symbol(grad, library, "aoti_torch_grad_mode_is_enabled") &&
                     find_symbol(threads, library, "_ZN2at15get_num_threadsEv") &&
                     find_symbol(callbacks, library, "_ZN2at12hasCallbacksEv") &&
                     find_symbol(function_modes, library, "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv") &&
                     find_symbol(dim, library, "aoti_torch_get_dim") &&
                     find_symbol(sizes, library, "aoti_torch_get_sizes") &&
                     find_symbol(strides, library, "aoti_torch_get_strides");
    if (!all) return false;
    py::module_ torch = py::module_::import("torch");
    const Inside ordinary(torch.attr("inference_mode")(false));  // the first call may come from inside of it
    keys_at = find_key_word();
    if (keys_at == 0 || !answers(torch)) return false;
    const auto keep = [&](const char* name) { return py::object(torch.attr(name)).release().ptr(); };
    empty = keep("empty"), float32 = keep("float32"), channels_last = keep("channels_last");
    cpu = py::object(torch.attr("device")("cpu")).release().ptr();
    row_names = py::make_tuple("dtype", "device").release().ptr();
    image_names = py::make_tuple("dtype", "device", "memory_format").release().ptr();
    return true;
  }

  // what each context changes must be seen, and go again
  bool answers(const py::module_& torch) const {
    const auto inside = [](const py::object& context, const auto& f) {
      const Inside now(context);
      return f();
    };
    const Keys before = *keys();
    const std::int64_t modes = function_modes();
    py::module_ modes_of = py::module_::import("torch.utils._python_dispatch");
    bool good = threads() == torch.attr("get_num_threads")().cast<int>();
    good = good && inside(torch.attr("autocast")("cpu"), [&] { return *keys() != before; });
    good = good && inside(modes_of.attr("TorchDispatchMode")(), [&] { return *keys() != before; });
    good = good && inside(torch.attr("device")("cpu"), [&] { return function_modes() == modes + 1; });
    good = good && inside(torch.attr("enable_grad")(), [&] { return grad(); });
    good = good && inside(torch.attr("no_grad")(), [&] { return !grad(); });
    const py::object t = torch.attr("zeros")(py::make_tuple(2, 3)).attr("t")();
    Sizes s{}, p{};
    std::int64_t n = 0;
    const void* impl = dtype_word().impl(t.ptr());
    good = good && dim(&impl, &n) == 0 && n == 2 && read(impl, 2, s, p) && s[0] == 3 && s[1] == 2 && p[0] == 1 &&
           p[1] == 3;
    return good && *keys() == before && function_modes() == modes;
  }
};

const Torch& torch_state() { return made_once<Torch>(); }

// Lanes step aside while somebody watches what the long way does. Changed under the GIL.
int g_paused = 0;

class Lane {
 public:
  Lane(py::object module, py::object guard, py::object program, py::list hooks)
      : module_(std::move(module)),
        guard_object_(std::move(guard)),
        program_object_(std::move(program)),
        hooks_(std::move(hooks)),
        guard_(guard_of(guard_object_)),
        program_(program_object_.cast<const PyProgram*>()) {
    if (!PyWeakref_Check(module_.ptr())) throw py::type_error("Lane: expected a weak reference to the module");
    for (py::handle h : hooks_)
      if (!PyDict_Check(h.ptr())) throw py::type_error("Lane: expected a list of dicts of hooks");
  }

  /// Notes an input that has just passed all checks, and the shape of its output. False if it cannot be recognized.
  bool learn(const py::object& x, const py::tuple& shape) {
    Input now;
    if (!torch_state().found || !look(x.ptr(), now)) return false;
    if (!shape_of(now)) cases_[oldest_++ % kCases] = {now, shape};
    return true;
  }

  /// The output, a new reference; None: go the long way; null with an error set.
  PyObject* run(PyObject* module, PyObject* x) {
    const Torch& torch = torch_state();
    Input now;
    if (g_paused || alive() != module || !look(x, now)) Py_RETURN_NONE;
    const py::object shape = shape_of(now);
    if (!shape) Py_RETURN_NONE;
    for (py::handle h : hooks_)
      if (PyDict_Size(h.ptr()) != 0) Py_RETURN_NONE;
    if (check(*guard_, module) != 0) Py_RETURN_NONE;
    const void* impl = dtype_word().impl(x);
    void* address = nullptr;
    if (tensor_functions().data_ptr(&impl, &address) != 0) Py_RETURN_NONE;

    PyObject* const arguments[] = {shape.ptr(), torch.float32, torch.cpu, torch.channels_last};
    PyObject* const names = PyTuple_GET_SIZE(shape.ptr()) == 4 ? torch.image_names : torch.row_names;
    py::object out = py::reinterpret_steal<py::object>(PyObject_Vectorcall(torch.empty, arguments, 1, names));
    std::uintptr_t to = 0;
    if (!out || !read_data_ptr(out.ptr(), to)) return nullptr;
    const auto& s = now.size;
    const int n = static_cast<int>(s[0]), h = static_cast<int>(s[2]), w = static_cast<int>(s[3]);
    Strides strides;
    for (int i = 0; i < 4; ++i) strides[i] = static_cast<std::ptrdiff_t>(now.stride[i]);
    run_program(*program_, reinterpret_cast<Address>(address), n, h, w, strides, to, now.threads);
    return out.release().ptr();
  }

 private:
  // what is compared
  struct Input {
    int threads = 0;
    DtypeWord::Word dtype = 0;
    std::uint64_t tensor_keys = 0;
    Sizes size{}, stride{};
    Keys keys{};

    bool same(const Input& o) const {
      return threads == o.threads && size == o.size && stride == o.stride && keys == o.keys &&
             tensor_keys == o.tensor_keys && dtype == o.dtype;
    }
  };
  struct Case {
    Input input;
    py::object shape;  // of the output, a tuple
  };

  // null: not met yet. A reference, since other threads learn while Python runs in this one.
  py::object shape_of(const Input& now) const {
    for (const Case& c : cases_)
      if (c.input.same(now)) return c.shape;
    return {};
  }
  PyObject* alive() const {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* o = nullptr;
    PyWeakref_GetRef(module_.ptr(), &o);
    Py_XDECREF(o);  // the caller holds it, if it is the module that is called
    return o;
#else
    return PyWeakref_GetObject(module_.ptr());
#endif
  }
  // false: nothing that a lane takes
  static bool look(PyObject* x, Input& seen) {
    const Torch& torch = torch_state();
    if (Py_TYPE(x) != tensor_type() || torch.grad() || torch.function_modes() != 0 || torch.callbacks()) return false;
    const void* impl = dtype_word().impl(x);
    std::int64_t n = 0;
    if (torch.dim(&impl, &n) != 0 || n != 4 || !torch.read(impl, 4, seen.size, seen.stride)) return false;
    seen.threads = torch.threads();
    seen.dtype = dtype_word().read(x);
    seen.tensor_keys = load_at<std::uint64_t>(impl, torch.keys_at);
    seen.keys = *torch.keys();
    return seen.size[0] > 0;
  }

  static constexpr std::size_t kCases = 8;
  py::object module_, guard_object_, program_object_;
  py::list hooks_;
  Guard* guard_;
  const PyProgram* program_;
  std::array<Case, kCases> cases_;
  std::size_t oldest_ = 0;
};

// A plain C function: the dispatcher of bound methods is more to fetch. `self` is a capsule that holds the Lane.
PyObject* run_lane(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  if (n != 2) return PyErr_SetString(PyExc_TypeError, "Lane.call: expected the module and its input"), nullptr;
  auto* lane = static_cast<std::shared_ptr<Lane>*>(PyCapsule_GetPointer(self, nullptr));
  try {
    return (*lane)->run(args[0], args[1]);
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

PyMethodDef g_run = {"lane", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_lane)), METH_FASTCALL,
                     "(module, input): the output, or None where the long way has to look"};

}  // namespace

void bind_lane(py::module_& m) {
  py::class_<Lane, std::shared_ptr<Lane>>(m, "Lane", "A model's forward for inputs like those it was shown.")
      .def(py::init<py::object, py::object, py::object, py::list>(), py::arg("module"), py::arg("guard"),
           py::arg("program"), py::arg("hooks"))
      .def("learn", &Lane::learn, py::arg("x"), py::arg("shape"))
      .def_property_readonly("call", [](const std::shared_ptr<Lane>& lane) {
        const py::capsule self(new std::shared_ptr<Lane>(lane),
                               [](void* p) { delete static_cast<std::shared_ptr<Lane>*>(p); });
        return py::reinterpret_steal<py::object>(PyCFunction_New(&g_run, self.ptr()));
      });
  m.def("lanes_found", [] { return torch_state().found; }, "false: every call goes the long way");
  m.def("pause_lanes", [](int by) { g_paused += by; }, py::arg("by"));
}
