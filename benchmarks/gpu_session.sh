#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds the native library in place, then tests and benchmarks from the source tree.
#   benchmarks/gpu_session.sh [build] [test [pytest arguments]] | [bench [mnv4-ops bench arguments]] | [check ...]
# Without arguments: build, the tests that need a GPU, the suite of `check`, and the bench of the convolution models; that
# takes half an hour, one model and dtype of the bench (--model conv_small --dtype float16 --batch 1,8,64,256) some minutes.
# Needs Python >= 3.10 with torch >= 2.10, its triton, timm, typer, rich, pytest, pybind11, and cmake and ninja.
# Results go to $OUT, or benchmarks/results without it.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

build() {
  local start=$SECONDS folder=build/in-place
  local generator=()
  ! command -v ninja >/dev/null || generator=(-G Ninja)
  cmake -S . -B "$folder" "${generator[@]}" -DPython_EXECUTABLE="$(command -v "$python")" >"$out/cmake.log" 2>&1 &&
    cmake --build "$folder" --parallel "$(nproc)" >>"$out/cmake.log" 2>&1 || { tail -30 "$out/cmake.log"; return 1; }
  # the package's own folder for them exists only in an installed copy
  [ -e mnv4_ops/triton_kernels ] || ln -s ../triton_kernels mnv4_ops/triton_kernels
  echo "built in $((SECONDS - start)) s"
  "$python" -m mnv4_ops.cli info
}

tests() {
  local options=(-m gpu -p no:cacheprovider) files=()
  # these only: other tests import packages that need not be there
  for file in tests/test_gpu_*.py tests/test_triton_*.py; do [ ! -e "$file" ] || files+=("$file"); done
  # options of plugins that are not there would be errors under --strict-config
  "$python" -c 'import pytest_timeout' 2>/dev/null || options+=(-o addopts="-ra --import-mode=importlib --strict-markers")
  "$python" -m pytest "${options[@]}" "${files[@]}" "$@" 2>&1 | tee "$out/gpu-tests.txt"
  return "${PIPESTATUS[0]}"
}

check() { "$python" -m mnv4_ops.cli check --device cuda --json "$out/gpu-check.json" "$@"; }

bench() { "$python" -m mnv4_ops.cli bench --device cuda --json "$out/gpu.json" --markdown "$out/gpu.md" "$@"; }

command=${1:-all}
[ $# = 0 ] || shift
case $command in
  build) build ;;
  test) tests "$@" ;;
  check) check "$@" ;;
  bench) bench "$@" ;;
  all)
    build
    status=0
    tests || status=1
    check || status=1
    bench --model all-conv --batch 1,8,64,256 || status=1
    exit $status
    ;;
  *)
    echo "usage: $0 [build | test ... | check ... | bench ...]" >&2
    exit 2
    ;;
esac
