# aarch64 Linux from another machine: clang or the cross g++ (MNV4_OPS_ARM_COMPILER=g++) against the sysroot $ARM64_SYSROOT, which has
# Python's headers.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(sysroot $ENV{ARM64_SYSROOT})
if("$ENV{MNV4_OPS_ARM_COMPILER}" STREQUAL "g++")
  set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
else()
  set(CMAKE_CXX_COMPILER clang++-19)
  set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-gnu)
  set(CMAKE_EXE_LINKER_FLAGS_INIT -fuse-ld=lld-19)
  set(CMAKE_SHARED_LINKER_FLAGS_INIT -fuse-ld=lld-19)
  set(CMAKE_MODULE_LINKER_FLAGS_INIT -fuse-ld=lld-19)
endif()
if(sysroot)
  # Debian's pyconfig.h includes one under usr/include; after all others, so that it hides no header of the cross libc
  set(CMAKE_CXX_FLAGS_INIT "-isystem ${sysroot}/usr/include/python3.11 -idirafter ${sysroot}/usr/include")
  # otherwise the wheel's tag is right and the file inside has the name of this machine's architecture
  set(PYTHON_MODULE_EXTENSION ".cpython-311-aarch64-linux-gnu.so" CACHE INTERNAL "")
  set(PYTHON_IS_DEBUG FALSE CACHE INTERNAL "")
endif()
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
