#!/bin/sh
# sh build.sh OUTPUT: builds host.cpp with the headers and libraries that `pip install torch` has brought; $PYTHON and $CXX choose others
set -e
folder=$("${PYTHON:-python}" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
abi=$("${PYTHON:-python}" -c 'import torch; print(int(torch.compiled_with_cxx11_abi()))')
exec "${CXX:-c++}" -std=c++20 -O1 -D_GLIBCXX_USE_CXX11_ABI="$abi" -I"$folder/include" -I"$folder/include/torch/csrc/api/include" \
  "$(dirname "$0")/host.cpp" -o "$1" -L"$folder/lib" -Wl,-rpath,"$folder/lib" -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
