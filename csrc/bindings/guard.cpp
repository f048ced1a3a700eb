// Guard: what the packed weights of a module were made from, and the one call that checks that all of it still stands.
//
// Modules, dicts and tensors are borrowed. Each pointer is used only after the object that holds it was found
// unchanged, from the root (which the caller passes, alive) downwards, so nothing here keeps a module alive. The
// storages are kept alive by aliases (detached tensors): an address that was recorded cannot be given to another
// tensor, and says which memory it is, whatever the device. A view that was assigned to `.data` may have the same
// address and another dtype, so that is compared as well.
#include "bindings/guard.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/torch_tensor.h"

namespace mnv4 {
namespace {

// dict versions are globally unique and move with every write; later Pythons have none, every name is looked up there
#if PY_VERSION_HEX < 0x030D0000 && !defined(PYPY_VERSION)
constexpr bool kVersions = true;
inline std::uint64_t dict_version(PyObject* d) {
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#endif
  return reinterpret_cast<PyDictObject*>(d)->ma_version_tag;
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
}
#else
constexpr bool kVersions = false;
inline std::uint64_t dict_version(PyObject*) { return 0; }
#endif

constexpr std::size_t kAhead = 12;  // records whose memory is fetched before they are looked at
constexpr std::size_t kHints = 9;

enum Code : int { kOk = 0, kStale = 1, kStructure = 2, kTraining = 3, kHooks = 4, kOwnForward = 5, kGrad = 6 };

struct Names {
  PyObject *modules, *parameters, *buffers, *hooks, *pre_hooks, *training, *forward;
};

const Names& names() {
  static const Names n = {PyUnicode_InternFromString("_modules"),
                          PyUnicode_InternFromString("_parameters"),
                          PyUnicode_InternFromString("_buffers"),
                          PyUnicode_InternFromString("_forward_hooks"),
                          PyUnicode_InternFromString("_forward_pre_hooks"),
                          PyUnicode_InternFromString("training"),
                          PyUnicode_InternFromString("forward")};
  return n;
}

inline void prefetch_line(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

// the dict of an instance, borrowed from the instance
PyObject* instance_dict(PyObject* o) {
  PyObject* d = PyObject_GenericGetDict(o, nullptr);
  if (!d) return PyErr_Clear(), nullptr;
  Py_DECREF(d);
  return d;
}

PyObject* item(PyObject* dict, PyObject* name) {
  PyObject* v = PyDict_GetItemWithError(dict, name);
  if (!v && PyErr_Occurred()) PyErr_Clear();
  return v;
}

PyObject* dict_item(PyObject* dict, PyObject* name) {
  PyObject* v = item(dict, name);
  return v && PyDict_Check(v) ? v : nullptr;
}

struct TensorRecord {
  PyObject* object;  // borrowed
  PyTypeObject* type;
  int module;
  std::string name;
  bool versioned = false;
  std::int64_t version = 0;
  std::uintptr_t address = 0;
  PyObject* dtype = nullptr;  // borrowed
  DtypeWord::Word word = 0;   // see there
  // where the object behind the tensor, its storage and its version counter are: only prefetched, so a stale one does
  // no harm
  std::array<const char*, kHints> hints{};

  explicit TensorRecord(PyObject* t, int m, std::string n)
      : object(t), type(Py_TYPE(t)), module(m), name(std::move(n)) {
    versioned = read_version(t, version);
    if (!read_data_ptr(t, address)) address = 0;
    dtype = read_dtype(t);
    if (dtype_word().word_at) word = dtype_word().read(t);
  }
  bool same() const {
    if (Py_TYPE(object) != type) return false;
    const TensorFunctions& direct = tensor_functions();
    if (direct.version != nullptr) {
      if (!direct.same(object, versioned, version, address)) return false;
    } else {
      std::int64_t v = 0;
      std::uintptr_t a = 0;
      if (versioned && (!read_version(object, v) || v != version)) return false;
      if (!read_data_ptr(object, a) || a != address) return false;
    }
    const DtypeWord& where = dtype_word();
    return (where.word_at && where.read(object) == word) || read_dtype(object) == dtype;
  }
  void find_hints() {
    PyObject* v = PyObject_GetAttrString(object, "_cdata");
    const char* impl = v ? static_cast<const char*>(PyLong_AsVoidPtr(v)) : nullptr;
    Py_XDECREF(v);
    if (PyErr_Occurred()) PyErr_Clear();
    hints[0] = reinterpret_cast<const char*>(object);
    if (!impl) return;
    for (std::size_t i = 1; i < 4; ++i) hints[i] = impl + 64 * (i - 1);
    // the first words of any tensor: vtable, counts, then pointers, of which the first is the storage
    for (std::size_t i = 4; i < 8; ++i) std::memcpy(&hints[i], impl + 8 * (i - 2), sizeof(char*));
    hints[8] = hints[4] + 64;
  }
  void prefetch() const {
    for (const char* p : hints) prefetch_line(p);
  }
};

struct ModuleRecord {
  PyObject* object = nullptr;  // borrowed; the root is the one that the caller passes
  PyTypeObject* type = nullptr;
  int parent = -1;
  bool called = false, grows = false;  // grows: what is added to its children is run
  Py_ssize_t count = 0;                // of its children, those that nobody recorded included
  PyObject *dict = nullptr, *modules = nullptr, *parameters = nullptr, *buffers = nullptr, *hooks = nullptr,
           *pre_hooks = nullptr;
  std::uint64_t v_dict = 0, v_modules = 0, v_parameters = 0, v_buffers = 0;
  bool tensors = false;
  std::vector<std::pair<PyObject*, int>> children;            // owned name, index
  std::vector<std::pair<PyObject*, PyObject*>> attributes;    // owned name, owned value
  std::vector<std::pair<PyObject*, PyObject*>> params, bufs;  // owned name, borrowed tensor or None
  void prefetch() const {
    for (const PyObject* p : {object, dict, hooks, pre_hooks}) prefetch_line(p);
    if (grows) prefetch_line(modules);
    if (tensors) prefetch_line(parameters), prefetch_line(buffers);
  }
  std::vector<TensorRecord> counters;  // num_batches_tracked: moves only while training, which writes to the module
  std::string path;
};

}  // namespace

class Guard {
 public:
  /// modules: (parent index, name, module, called); the first is the root. Hooks and an own forward of a module that is
  /// called as a module are its own matter. attributes: (module index, name, value).
  /// tensors: (module index, name, is a buffer, tensor or None). aliases: kept alive as long as the guard.
  Guard(const py::list& modules, const py::list& attributes, const py::list& tensors, py::list aliases)
      : aliases_(std::move(aliases)) {
    for (py::handle h : modules) {
      auto t = py::reinterpret_borrow<py::tuple>(h);
      ModuleRecord r;
      r.parent = t[0].cast<int>();
      py::object name = t[1], module = t[2];
      r.called = t[3].cast<bool>();
      r.object = module.ptr();
      r.type = Py_TYPE(r.object);
      const std::string own = py::cast<std::string>(name);
      const int index = static_cast<int>(modules_.size());
      if (r.parent >= index || (r.parent < 0) != (index == 0))
        throw py::value_error("Guard: expected a parent before its child");
      if (r.parent >= 0) {
        const std::string& above = modules_[r.parent].path;
        r.path = above.empty() ? own : above + "." + own;
        modules_[r.parent].children.emplace_back(intern(name), index);
      }
      modules_.push_back(std::move(r));
    }
    for (py::handle h : attributes) {
      auto t = py::reinterpret_borrow<py::tuple>(h);
      py::object name = t[1], value = t[2];
      at(t[0].cast<int>()).attributes.emplace_back(intern(name), value.release().ptr());
    }
    for (py::handle h : tensors) {
      auto t = py::reinterpret_borrow<py::tuple>(h);
      const int index = t[0].cast<int>();
      py::object name = t[1], tensor = t[3];
      ModuleRecord& m = at(index);
      m.tensors = true;
      (t[2].cast<bool>() ? m.bufs : m.params).emplace_back(intern(name), tensor.ptr());
      if (tensor.is_none()) continue;
      TensorRecord r(tensor.ptr(), index, py::cast<std::string>(name));
      if (r.name == "num_batches_tracked") {
        m.counters.push_back(std::move(r));
      } else {
        r.find_hints();
        tensors_.push_back(std::move(r));
      }
    }
    // no versions yet: the first check looks everything up by name
    if (modules_.empty()) throw py::value_error("Guard: expected at least one module");
    for (ModuleRecord& m : modules_) {
      m.grows = !m.children.empty() || (!m.called && std::string_view(m.type->tp_name) == "Sequential");
      PyObject* d = instance_dict(m.object);
      PyObject* children = d ? dict_item(d, names().modules) : nullptr;
      if (children) m.count = PyDict_GET_SIZE(children);
    }
  }

  ~Guard() {
    for (ModuleRecord& m : modules_) {
      for (auto& c : m.children) Py_DECREF(c.first);
      for (auto& a : m.attributes) Py_DECREF(a.first), Py_DECREF(a.second);
      for (auto& p : m.params) Py_DECREF(p.first);
      for (auto& b : m.bufs) Py_DECREF(b.first);
    }
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  int check(py::handle root, bool grad) {
    int code = kOk;
    const std::size_t n = modules_.size();
    for (std::size_t i = 0; i < n; ++i) {
      // the kernels have swept the caches since the last check
      if (i + kAhead < n) modules_[i + kAhead].prefetch();
      ModuleRecord& m = modules_[i];
      PyObject* o = i == 0 ? root.ptr() : m.object;
      if (Py_TYPE(o) != m.type) return fail(kStructure, i, "its class");
      PyObject* d = instance_dict(o);
      if (!d) return fail(kStructure, i, "its __dict__");
      const bool same =
          kVersions && dict_version(d) == m.v_dict && (!m.grows || dict_version(m.modules) == m.v_modules) &&
          (!m.tensors || (dict_version(m.parameters) == m.v_parameters && dict_version(m.buffers) == m.v_buffers));
      if (!same && (code = walk(i, o, d)) != kOk) return code;
      if (!m.called && (PyDict_GET_SIZE(m.hooks) != 0 || PyDict_GET_SIZE(m.pre_hooks) != 0))
        return fail(kHooks, i, "hooks");
    }
    const std::size_t total = tensors_.size();
    for (std::size_t i = 0; i < std::min(kAhead, total); ++i) tensors_[i].prefetch();
    for (std::size_t i = 0; i < total; ++i) {
      if (i + kAhead < total) tensors_[i + kAhead].prefetch();
      if (!tensors_[i].same()) return stale(tensors_[i]);
    }
    if (grad)
      for (const TensorRecord& t : tensors_)
        if (read_requires_grad(t.object)) return fail(kGrad, t.module, t.name);
    return kOk;
  }

  std::string where() const { return where_; }
  std::size_t size() const { return tensors_.size(); }

 private:
  static PyObject* intern(const py::object& name) {
    PyObject* s = py::object(name).release().ptr();
    PyUnicode_InternInPlace(&s);
    return s;
  }
  ModuleRecord& at(int i) {
    if (i < 0 || i >= static_cast<int>(modules_.size()))
      throw py::index_error("Guard: expected the index of a recorded module");
    return modules_[i];
  }
  int fail(int code, std::size_t module, const std::string& what) {
    const std::string& path = modules_[module].path;
    where_ = path.empty() ? what : path + "." + what;
    return code;
  }
  int stale(const TensorRecord& t) { return fail(kStale, t.module, t.name); }

  // false when the module has lost one of the dicts that every nn.Module has
  bool refresh(std::size_t i, PyObject* o) {
    const Names& n = names();
    ModuleRecord& m = modules_[i];
    PyObject* d = instance_dict(o);
    if (!d) return false;
    m.dict = d;
    m.modules = dict_item(d, n.modules);
    m.parameters = dict_item(d, n.parameters);
    m.buffers = dict_item(d, n.buffers);
    m.hooks = dict_item(d, n.hooks);
    m.pre_hooks = dict_item(d, n.pre_hooks);
    if (!m.modules || !m.parameters || !m.buffers || !m.hooks || !m.pre_hooks) {
      m.v_dict = 0;
      return false;
    }
    m.v_dict = dict_version(d);
    m.v_modules = dict_version(m.modules);
    m.v_parameters = dict_version(m.parameters);
    m.v_buffers = dict_version(m.buffers);
    return true;
  }

  // looks everything of one module up by name
  int walk(std::size_t i, PyObject* o, PyObject* d) {
    const Names& n = names();
    ModuleRecord& m = modules_[i];
    m.v_dict = 0;
    if (!m.called && item(d, n.forward)) return fail(kOwnForward, i, "forward");
    for (auto& [name, value] : m.attributes) {
      PyObject* now = item(d, name);
      if (now == value || (!now && value == Py_Ellipsis)) continue;  // ... stands for no such attribute
      if (name == n.training) return fail(kTraining, i, "training");
      const int equal = now && Py_TYPE(now) == Py_TYPE(value) ? PyObject_RichCompareBool(now, value, Py_EQ) : 0;
      if (equal < 0) PyErr_Clear();
      if (equal != 1) return fail(kStructure, i, py::cast<std::string>(py::handle(name)));
    }
    PyObject* children = dict_item(d, n.modules);
    PyObject* params = dict_item(d, n.parameters);
    PyObject* buffers = dict_item(d, n.buffers);
    if (!children || !params || !buffers) return fail(kStructure, i, "its __dict__");
    if (m.grows && PyDict_GET_SIZE(children) != m.count) return fail(kStructure, i, "its modules");
    for (auto& [name, index] : m.children)
      if (item(children, name) != modules_[index].object) return fail(kStructure, index, "the module");
    for (auto& [name, tensor] : m.params)
      if (item(params, name) != tensor) return fail(kStale, i, py::cast<std::string>(py::handle(name)));
    for (auto& [name, tensor] : m.bufs)
      if (item(buffers, name) != tensor) return fail(kStale, i, py::cast<std::string>(py::handle(name)));
    for (const TensorRecord& t : m.counters)
      if (!t.same()) return stale(t);
    return refresh(i, o) ? kOk : fail(kStructure, i, "its __dict__");
  }

  std::vector<ModuleRecord> modules_;
  std::vector<TensorRecord> tensors_;
  py::list aliases_;
  std::string where_;
};

Guard* guard_of(py::handle h) { return h.cast<Guard*>(); }
int check(Guard& guard, py::handle root) { return guard.check(root, false); }

namespace {

/// Addresses and versions of a list of tensors (or None) as two byte strings: a key, and what tells a changed content.
py::tuple fingerprint(const py::list& tensors) {
  const std::size_t n = tensors.size();
  const TensorFunctions& direct = tensor_functions();
  const DtypeWord& where = dtype_word();
  std::vector<std::uintptr_t> address(n, 0);
  std::vector<std::int64_t> version(n, 0), dtype(n, 0);
  for (std::size_t i = 0; i < n; ++i) {
    PyObject* t = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    if (t == Py_None) continue;
    if (!(direct.version != nullptr && is_tensor(t) && direct.read(t, version[i], address[i]))) {
      if (!read_data_ptr(t, address[i])) throw py::type_error("fingerprint: expected a list of tensors or None");
      if (!read_version(t, version[i])) version[i] = -1;
    }
    dtype[i] = where.word_at != 0 && is_tensor(t) ? where.read(t) : reinterpret_cast<std::intptr_t>(read_dtype(t));
  }
  const auto bytes = [n](const void* p) { return py::bytes(static_cast<const char*>(p), n * sizeof(std::int64_t)); };
  return py::make_tuple(bytes(address.data()), py::make_tuple(bytes(version.data()), bytes(dtype.data())));
}

/// A hash of the contents of float arrays, each (address, elements). Reads the memory it is given.
std::uint64_t checksum(const py::list& arrays) {
  constexpr std::size_t kLanes = 16;  // one multiplication need not wait for the one before
  constexpr std::uint64_t kPrime = 0x100000001b3u;
  std::array<std::uint64_t, kLanes> lanes;
  for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = 0xcbf29ce484222325u + i;
  for (py::handle h : arrays) {
    auto t = py::reinterpret_borrow<py::tuple>(h);
    const auto* p = reinterpret_cast<const char*>(t[0].cast<std::uintptr_t>());
    const auto count = t[1].cast<std::size_t>();
    const auto mix = [&](std::size_t i, std::size_t lane) {
      std::uint32_t word;
      std::memcpy(&word, p + 4 * i, sizeof word);
      lanes[lane] = (lanes[lane] ^ word) * kPrime;
      lanes[lane] ^= lanes[lane] >> 29;
    };
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (std::size_t lane = 0; lane < kLanes; ++lane) mix(i + lane, lane);
    for (; i < count; ++i) mix(i, 0);
  }
  std::uint64_t hash = 0;
  for (std::uint64_t lane : lanes) hash = (hash ^ lane) * kPrime, hash ^= hash >> 29;
  return hash;
}

}  // namespace

void bind_guard(py::module_& m) {
  py::class_<Guard> guard(m, "Guard", "Checks that modules and tensors are as they were when the guard was made.");
  guard
      .def(py::init<const py::list&, const py::list&, const py::list&, py::list>(), py::arg("modules"),
           py::arg("attributes"), py::arg("tensors"), py::arg("aliases"))
      .def("check", &Guard::check, py::arg("root"), py::arg("grad"),
           "0: unchanged. Otherwise STALE, STRUCTURE, TRAINING, HOOKS, OWN_FORWARD or GRAD; where() names the place.")
      .def("where", &Guard::where)
      .def("__len__", &Guard::size);
  guard.attr("STALE") = int(kStale);
  guard.attr("STRUCTURE") = int(kStructure);
  guard.attr("TRAINING") = int(kTraining);
  guard.attr("HOOKS") = int(kHooks);
  guard.attr("OWN_FORWARD") = int(kOwnForward);
  guard.attr("GRAD") = int(kGrad);
  m.def(
      "tensor_functions_found", [] { return tensor_functions().version != nullptr; },
      "false: Guard asks each tensor for its version and address through Python");
  m.def("dtype_word_found", [] { return dtype_word().word_at != 0; }, "false: Guard asks each tensor for its dtype");
  m.def("checksum", &checksum, py::arg("arrays"), "hash of the contents of float32 arrays, each (address, elements)");
  m.def("fingerprint", &fingerprint, py::arg("tensors"),
        "(addresses, (versions, dtypes)) of a list of tensors or None, as bytes");
}

}  // namespace mnv4
