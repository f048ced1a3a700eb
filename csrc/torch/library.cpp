// libmnv4_ops_torch: the op mnv4::native_program for torch without Python, registered when the library is loaded into a
// process that has libtorch.
#include <cstdio>
#include <cstring>
#include <list>
#include <mutex>
#include <vector>

#include "core/call.h"
#include "core/kernels.h"
#include "torch/description.h"
#include "torch/stable.h"

namespace mnv4 {
namespace {

using namespace stable;

constexpr const char* kSchema = "native_program(Tensor x, Tensor[] params, float[] eps, str program) -> Tensor";
constexpr std::size_t kKept = 16;      // packed programs
constexpr std::int64_t kWhole = 8192;  // floats up to which a tensor is compared as a whole
constexpr int kSamples = 16;           // numbers of a larger tensor that are looked at in every call

struct Array {
  const float* p = nullptr;
  std::int64_t count = 0;   // elements
  std::int64_t extent = 0;  // floats from the first to the last one in memory
};

struct Strided {
  std::int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  Strided(Handle t, const char* name) {
    const Functions& f = functions();
    require(f.aoti_torch_get_dim(t, &dims), name);
    require(f.aoti_torch_get_sizes(t, &sizes), name);
    require(f.aoti_torch_get_strides(t, &strides), name);
  }
};

/// A float32 tensor of the CPU.
Array array_of(Handle t, const char* name) {
  const Functions& f = functions();
  std::int32_t dtype = 0, device = 0;
  void* p = nullptr;
  Array a;
  require(f.aoti_torch_get_dtype(t, &dtype), name);
  require(f.aoti_torch_get_device_type(t, &device), name);
  require(f.aoti_torch_get_numel(t, &a.count), name);
  if (dtype != f.aoti_torch_dtype_float32()) refuse(std::string("expected ") + name + " of dtype float32");
  if (device != f.aoti_torch_device_type_cpu()) refuse(std::string("expected ") + name + " on the CPU");
  require(f.aoti_torch_get_data_ptr(t, &p), name);
  const Strided s(t, name);
  if (a.count > 0) a.extent = 1;
  for (std::int64_t i = 0; i < s.dims && a.count > 0; ++i) a.extent += (s.sizes[i] - 1) * s.strides[i];
  a.p = static_cast<const float*>(p);
  return a;
}

/// Its elements in the order of their indices.
std::vector<float> contiguous(Handle t, const Array& a) {
  const Strided s(t, "params");
  std::vector<float> out(static_cast<std::size_t>(a.count));
  std::vector<std::int64_t> at(static_cast<std::size_t>(s.dims), 0);
  std::int64_t offset = 0;
  for (float& value : out) {
    value = a.p[offset];
    for (std::int64_t i = s.dims - 1; i >= 0; --i) {
      offset += s.strides[i];
      if (++at[i] < s.sizes[i]) break;
      offset -= s.strides[i] * s.sizes[i];
      at[i] = 0;
    }
  }
  return out;
}

/// What a tensor looked like when it was packed. No torch counts what a runner writes to constants, another model may
/// come to lie where one was freed, and compilers compute constants of one value anew in each call: small tensors are
/// compared as a whole, large ones by address and a few numbers.
class Seen {
 public:
  explicit Seen(const Array& a) : count_(a.count), extent_(a.extent) {
    if (whole()) {
      copy_.assign(a.p, a.p + extent_);
    } else {
      p_ = a.p, hash_ = hash(a.p);
    }
  }
  bool same(const Array& a) const {
    if (a.count != count_ || a.extent != extent_) return false;
    if (whole()) return extent_ == 0 || std::memcmp(a.p, copy_.data(), copy_.size() * sizeof(float)) == 0;
    return a.p == p_ && hash(a.p) == hash_;
  }

 private:
  bool whole() const { return extent_ <= kWhole; }
  std::uint64_t hash(const float* p) const {
    std::uint64_t h = 14695981039346656037u;
    for (int k = 0; k < kSamples; ++k) {
      std::uint32_t bits;
      std::memcpy(&bits, p + (extent_ - 1) * k / (kSamples - 1), sizeof bits);
      h = (h ^ bits) * 1099511628211u;
      h ^= h >> 29;
    }
    return h;
  }

  std::int64_t count_, extent_;
  const float* p_ = nullptr;
  std::uint64_t hash_ = 0;
  std::vector<float> copy_;
};

/// Operations packed from tensors.
struct Packed {
  std::string text;
  std::vector<double> eps;
  std::vector<Seen> seen;
  std::vector<DescribedOp> described;
  std::vector<Op> ops;
  std::mutex planning;
  Plans plans;

  bool stands(const std::string_view program, const std::vector<double>& numbers,
              const std::vector<Array>& arrays) const {
    if (text != program || eps != numbers || arrays.size() != seen.size()) return false;
    for (std::size_t i = 0; i < arrays.size(); ++i) {
      if (!seen[i].same(arrays[i])) return false;
    }
    return true;
  }
};

void pack(DescribedOp& o, const std::vector<std::vector<float>>& tensors, const std::vector<double>& eps) {
  for (const StageSource& s : o.stages) {
    const float* p[kStageTensors];
    for (int i = 0; i < kStageTensors; ++i) {
      const int index = s.tensors[i];
      p[i] = index < 0 ? nullptr : tensors[index].data();
      const auto want = static_cast<std::size_t>(i == 0 ? s.rows * s.depth : s.rows);
      if (index >= 0 && tensors[index].size() != want)
        refuse("expected " + std::to_string(want) + " elements of params[" + std::to_string(index) + "], got " +
               std::to_string(tensors[index].size()));
    }
    if (!(eps[s.eps] >= 0)) refuse("expected eps of at least 0, got " + std::to_string(eps[s.eps]));
    const StageParams params{p[0], p[1], p[2], p[3], p[4], p[5], eps[s.eps], p[6]};
    if (o.mqa != nullptr) {
      const std::string wrong = o.mqa->pack(static_cast<MqaStage>(s.stage), params);
      if (!wrong.empty()) refuse(wrong);
    } else if (!(o.block != nullptr ? o.block->pack(static_cast<Stage>(s.stage), params)
                                    : o.head->pack(s.stage, params))) {
      throw std::bad_alloc();
    }
  }
  if (!std::visit([](auto* op) { return op->packed(); }, o.op())) refuse("expected all stages of each operation");
}

std::mutex lock;
std::list<std::shared_ptr<Packed>> kept;  // the latest first

std::shared_ptr<Packed> make(const std::string_view text, const std::vector<double>& eps,
                             const std::vector<Array>& arrays, const std::vector<OwnedTensor>& handles) {
  auto made = std::make_shared<Packed>();
  made->text = text, made->eps = eps;
  made->described = described(text, arrays.size(), eps.size());
  std::vector<std::vector<float>> tensors;
  for (std::size_t i = 0; i < handles.size(); ++i) {
    made->seen.emplace_back(arrays[i]);
    tensors.push_back(contiguous(handles[i].get(), arrays[i]));
  }
  for (DescribedOp& o : made->described) {
    pack(o, tensors, eps);
    made->ops.push_back(o.op());
  }
  return made;
}

std::shared_ptr<Packed> find_or_make(const std::string_view text, const std::vector<double>& eps,
                                     const std::vector<Array>& arrays, const std::vector<OwnedTensor>& handles) {
  std::vector<std::shared_ptr<Packed>> candidates;
  {
    const std::lock_guard<std::mutex> held(lock);
    candidates.assign(kept.begin(), kept.end());
  }
  for (const auto& p : candidates) {
    if (!p->stands(text, eps, arrays)) continue;
    if (p != candidates.front()) {
      const std::lock_guard<std::mutex> held(lock);
      kept.remove(p);
      kept.push_front(p);
    }
    return p;
  }
  auto made = make(text, eps, arrays, handles);
  const std::lock_guard<std::mutex> held(lock);
  kept.push_front(made);
  if (kept.size() > kKept) kept.pop_back();
  return made;
}

int small(std::int64_t size, const char* name) {
  if (size < 0 || size > (std::int64_t{1} << 30)) refuse(std::string("expected x of fewer ") + name);
  return static_cast<int>(size);
}

/// Canonical channels_last, or [n, features].
OwnedTensor empty_output(const Shape& s) {
  const bool pooled = s.h == 0;
  const std::int64_t sizes[] = {s.n, s.c, s.h, s.w}, flat[] = {s.c, 1};
  const std::int64_t row = static_cast<std::int64_t>(s.w) * s.c, strides[] = {row * s.h, 1, row, s.c};
  const Functions& f = functions();
  Handle out = nullptr;
  require(f.aoti_torch_empty_strided(pooled ? 2 : 4, sizes, pooled ? flat : strides, f.aoti_torch_dtype_float32(),
                                     f.aoti_torch_device_type_cpu(), 0, &out),
          "memory for the output");
  return OwnedTensor(out);
}

void native_program(Value* stack, std::uint64_t, std::uint64_t) {
  const Functions& f = functions();
  const OwnedTensor x(stack[0]);
  const OwnedList params(stack[1]), numbers(stack[2]);
  const OwnedString string(stack[3]);

  std::size_t length = 0, count = 0;
  const char* characters = nullptr;
  require(f.torch_string_length(string.get(), &length), "program");
  require(f.torch_string_c_str(string.get(), &characters), "program");
  const std::string_view text(characters, length);
  require(f.torch_list_size(numbers.get(), &count), "eps");
  std::vector<double> eps(count);
  for (std::size_t i = 0; i < count; ++i) {
    Value v = 0;
    require(f.torch_list_get_item(numbers.get(), i, &v), "eps");
    std::memcpy(&eps[i], &v, sizeof v);
  }
  require(f.torch_list_size(params.get(), &count), "params");
  std::vector<OwnedTensor> handles;
  std::vector<Array> arrays;
  handles.reserve(count), arrays.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    Value v = 0;
    require(f.torch_list_get_item(params.get(), i, &v), "params");
    handles.emplace_back(v);
    arrays.push_back(array_of(handles.back().get(), "params"));
  }

  const std::shared_ptr<Packed> packed = find_or_make(text, eps, arrays, handles);

  const Array input = array_of(x.get(), "x");
  const auto [dims, sizes, strides] = Strided(x.get(), "x");
  if (dims != 4) refuse("expected x with 4 dimensions [N, C, H, W], got " + std::to_string(dims));
  const int n = small(sizes[0], "images"), h = small(sizes[2], "rows"), w = small(sizes[3], "columns");
  if (sizes[1] != input_channels(packed->ops[0]))
    refuse("expected x with " + std::to_string(input_channels(packed->ops[0])) + " channels, got " +
           std::to_string(sizes[1]));
  if (h < 1 || w < 1) refuse("expected x with at least one row and one column");
  const std::string refused = refuses(packed->ops, h, w);
  if (!refused.empty()) refuse(refused);
  OwnedTensor out = empty_output(output_shape(packed->ops, n, h, w));
  if (n > 0) {
    std::uint32_t threads = 1;
    require(f.torch_get_num_threads(&threads), "the number of threads");
    std::shared_ptr<const ProgramPlan> plan;
    {
      const std::lock_guard<std::mutex> held(packed->planning);
      plan = packed->plans.get(packed->ops, n, h, w, static_cast<int>(threads));
    }
    void* to = nullptr;
    require(f.aoti_torch_get_data_ptr(out.get(), &to), "the output");
    forward(packed->ops, *plan, input.p, {strides[0], strides[1], strides[2], strides[3]}, static_cast<float*>(to));
  }
  stack[0] = out.release();
}

/// Once, when the library is loaded. The libraries of torch that hold the registration live as long as the process.
const bool registered = [] {
  const Functions& f = functions();
  if (f.missing != nullptr) {
    std::fprintf(stderr,
                 "mnv4_ops: no op is registered: expected a process with libtorch 2.10 or later, which has %s\n",
                 f.missing);
    return false;
  }
  pool_buffers();
  Handle definition = nullptr, kernels = nullptr;
  const bool done = f.aoti_torch_library_init_fragment("mnv4", __FILE__, __LINE__, &definition) == 0 &&
                    f.aoti_torch_library_def(definition, kSchema) == 0 &&
                    f.aoti_torch_library_init_impl("mnv4", "CPU", __FILE__, __LINE__, &kernels) == 0 &&
                    f.torch_library_impl(kernels, "native_program", &native_program, kVersion) == 0;
  if (!done) std::fprintf(stderr, "mnv4_ops: torch did not register mnv4::native_program\n");
  return done;
}();

}  // namespace
}  // namespace mnv4

/// Frees all packed weights; they are made anew by the next call. Needed after a change of a few elements of a large
/// weight, which is not noticed.
extern "C" __attribute__((visibility("default"))) void mnv4_ops_repack() {
  const std::lock_guard<std::mutex> held(mnv4::lock);
  mnv4::kept.clear();
}
