#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds the native library in place, then tests and benchmarks from the source tree.
#   benchmarks/gpu_session.sh [build] [test [pytest arguments]] | [bench [mnv4-ops bench arguments]] | [check ...]
#     | [blocks [SECONDS [dtype]]] | [ops [SECONDS [dtype]]]
# Without arguments: build, the tests that need a GPU, the suite of `check`, and the bench of the convolution models; that
# takes half an hour, one model and dtype of the bench (--model conv_small --dtype float16 --batch 1,8,64,256) some minutes.
# Needs Python >= 3.10 with torch >= 2.10, its triton, timm, typer, rich, pytest, pybind11, and cmake and ninja.
# blocks: every block of the convolution models and the attention of the hybrids, batch 1 and 64, into gpu_blocks.json and .md;
# ops: single convolutions, into gpu_ops.json and .md. Both are done after about SECONDS (360 and 240) and a minute.
# Results go to $OUT, or benchmarks/results without it.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results}
mkdir -p "$out"
# what torch.compile has made for one step serves the others
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$root/build/inductor}
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

# a step of a table: `rows FILE SECONDS [mnv4-ops bench arguments]`; what it has is on disk after every row
rows() {
  local file=$out/$1 seconds=$2
  shift 2
  timeout --kill-after=10 $((seconds + 60)) "$python" -m mnv4_ops.cli bench --device cuda --batch 1,64 --repeats 9 \
    --seconds 2 --limit "$seconds" --keep --json "$file.json" --markdown "$file.md" "$@"
}

blocks() { # attention first: it is short, and what a limit leaves out is of the largest model
  local seconds=${1:-360} dtype=${2:-float16} status=0
  rows gpu_blocks $((seconds / 4)) --blocks --ops mqa --model all-hybrid --dtype "$dtype" || status=1
  rows gpu_blocks $((seconds * 3 / 4)) --blocks --model conv_small,conv_medium,conv_large --dtype "$dtype" || status=1
  return $status
}

ops() {
  local seconds=${1:-240} dtype=${2:-float16}
  rows gpu_ops "$seconds" --ops pointwise,depthwise,depthwise_pointwise --model conv_small,conv_medium --dtype "$dtype"
}

command=${1:-all}
[ $# = 0 ] || shift
case $command in
  build) build ;;
  test) tests "$@" ;;
  check) check "$@" ;;
  bench) bench "$@" ;;
  blocks) blocks "$@" ;;
  ops) ops "$@" ;;
  all)
    build
    status=0
    tests || status=1
    check || status=1
    bench --model all-conv --batch 1,8,64,256 || status=1
    exit $status
    ;;
  *)
    echo "usage: $0 [build | test ... | check ... | bench ... | blocks ... | ops ...]" >&2
    exit 2
    ;;
esac
