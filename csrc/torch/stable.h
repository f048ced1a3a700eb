// The functions of torch's stable C interface that the op library calls. They are found in the process at run time and
// their types are written out here, so that building needs no torch. From torch 2.10 on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace mnv4::stable {

using Value = std::uint64_t;  // an argument or a result of an op; objects are owned handles
using Handle = void*;
using Status = std::int32_t;  // 0: done
using Kernel = void (*)(Value* stack, std::uint64_t arguments, std::uint64_t results);
/// The version of the interface that this is written for: what torch converts for it stays as it was then.
inline constexpr std::uint64_t kVersion = (std::uint64_t{2} << 56) | (std::uint64_t{10} << 48);

// name, result, parameters
#define MNV4_STABLE_FUNCTIONS(F)                                                                                   \
  F(aoti_torch_library_init_fragment, Status, (const char* ns, const char* file, std::uint32_t line, Handle* out)) \
  F(aoti_torch_library_init_impl, Status,                                                                          \
    (const char* ns, const char* key, const char* file, std::uint32_t line, Handle* out))                          \
  F(aoti_torch_library_def, Status, (Handle library, const char* schema))                                          \
  F(torch_library_impl, Status, (Handle library, const char* name, Kernel kernel, std::uint64_t version))          \
  F(torch_list_size, Status, (Handle list, std::size_t* out))                                                      \
  F(torch_list_get_item, Status, (Handle list, std::size_t index, Value* out))                                     \
  F(torch_delete_list, Status, (Handle list))                                                                      \
  F(torch_string_length, Status, (Handle string, std::size_t* out))                                                \
  F(torch_string_c_str, Status, (Handle string, const char** out))                                                 \
  F(torch_delete_string, Status, (Handle string))                                                                  \
  F(torch_get_num_threads, Status, (std::uint32_t* out))                                                           \
  F(aoti_torch_delete_tensor_object, Status, (Handle tensor))                                                      \
  F(aoti_torch_get_data_ptr, Status, (Handle tensor, void** out))                                                  \
  F(aoti_torch_get_dim, Status, (Handle tensor, std::int64_t* out))                                                \
  F(aoti_torch_get_numel, Status, (Handle tensor, std::int64_t* out))                                              \
  F(aoti_torch_get_sizes, Status, (Handle tensor, std::int64_t** out))                                             \
  F(aoti_torch_get_strides, Status, (Handle tensor, std::int64_t** out))                                           \
  F(aoti_torch_get_dtype, Status, (Handle tensor, std::int32_t* out))                                              \
  F(aoti_torch_get_device_type, Status, (Handle tensor, std::int32_t* out))                                        \
  F(aoti_torch_empty_strided, Status,                                                                              \
    (std::int64_t dims, const std::int64_t* sizes, const std::int64_t* strides, std::int32_t dtype,                \
     std::int32_t device_type, std::int32_t device_index, Handle* out))                                            \
  F(aoti_torch_dtype_float32, std::int32_t, ())                                                                    \
  F(aoti_torch_device_type_cpu, std::int32_t, ())

struct Functions {
#define MNV4_STABLE_MEMBER(name, result, parameters) result(*name) parameters = nullptr;
  MNV4_STABLE_FUNCTIONS(MNV4_STABLE_MEMBER)
#undef MNV4_STABLE_MEMBER
  const char* missing = nullptr;  // the first that this process does not have
  Functions();
};
const Functions& functions();

inline void require(Status status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string("mnv4::native_program: torch refused ") + what);
}

/// Owns what a handle refers to. `Delete` is a member of Functions.
template <Status (*Functions::*Delete)(Handle)>
class Owned {
 public:
  explicit Owned(Handle h = nullptr) : h_(h) {}
  explicit Owned(Value v) : h_(reinterpret_cast<Handle>(v)) {}
  Owned(Owned&& other) noexcept : h_(std::exchange(other.h_, nullptr)) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  Owned& operator=(Owned&&) = delete;
  ~Owned() {
    if (h_ != nullptr) (functions().*Delete)(h_);
  }
  Handle get() const { return h_; }
  Value release() { return reinterpret_cast<Value>(std::exchange(h_, nullptr)); }

 private:
  Handle h_;
};
using OwnedTensor = Owned<&Functions::aoti_torch_delete_tensor_object>;
using OwnedList = Owned<&Functions::torch_delete_list>;
using OwnedString = Owned<&Functions::torch_delete_string>;

}  // namespace mnv4::stable
