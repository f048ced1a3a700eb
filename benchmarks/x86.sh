#!/usr/bin/env bash
# Op tables and Pareto front of this machine into benchmarks/results, in less than twelve minutes on two quiet cores.
# usage: benchmarks/x86.sh [path of mnv4-ops]
set -euo pipefail
command=${1:-mnv4-ops}
results=$(cd "$(dirname "$0")" && pwd)/results
peers=torch_eager,torch_eager_cl,onnxruntime,openvino,xnnpack
"$command" bench --ops all --model all-conv,hybrid_medium --threads 1,2 --repeats 7 --seconds 1 --peers "$peers" \
  --json "$results/x86_ops.json" --markdown "$results/x86_ops.md"
"$command" pareto --threads 1 --repeats 5 --seconds 4 --json "$results/x86_pareto.json" --markdown "$results/x86_pareto.md"
