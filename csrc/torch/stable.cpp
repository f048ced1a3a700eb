#include "torch/stable.h"

#include <dlfcn.h>

namespace mnv4::stable {

Functions::Functions() {
#if defined(__APPLE__)
  const char* file = "libtorch_cpu.dylib";
#else
  const char* file = "libtorch_cpu.so";
#endif
  // Python loads torch's libraries without making their functions known to all
  void* library = dlopen(file, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) library = RTLD_DEFAULT;
#define MNV4_STABLE_FIND(name, result, parameters)                                          \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #name));                           \
  if (name == nullptr) name = reinterpret_cast<decltype(name)>(dlsym(RTLD_DEFAULT, #name)); \
  if (name == nullptr && missing == nullptr) missing = #name;
  MNV4_STABLE_FUNCTIONS(MNV4_STABLE_FIND)
#undef MNV4_STABLE_FIND
}

const Functions& functions() {
  static const Functions* found = new Functions();
  return *found;
}

}  // namespace mnv4::stable
