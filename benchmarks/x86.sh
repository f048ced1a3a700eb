#!/usr/bin/env bash
# Op tables and Pareto front of this machine into benchmarks/results: about nine minutes on two quiet cores.
# usage: benchmarks/x86.sh [path of mnv4-ops] [step...]
# Without steps all of it; a step is OPS-THREADS (e.g. pointwise,head-2) or families of models (e.g. MobileNetV4,ConvNeXt), for machines
# that are quiet for a minute at a time. What is measured again replaces its rows.
# $NAME (x86): of the files; $MODELS, $PEERS, $REPEATS, $SECONDS_PER_ROW: of the op tables; $LIMIT: seconds after which a step begins no further row, the next time it goes on.
# SMOKE=1: small sizes and one round, to see that it runs. $RESULTS: another folder.
set -euo pipefail
command=${1:-mnv4-ops}
shift || true
results=${RESULTS:-$(cd "$(dirname "$0")" && pwd)/results}
name=${NAME:-x86}
peers=${PEERS:-torch_eager,torch_eager_cl,onnxruntime,openvino,xnnpack}
ops=(--model "${MODELS:-all}" --repeats "${REPEATS:-7}" --seconds "${SECONDS_PER_ROW:-1}")
pareto=(--threads 1 --repeats 5 --seconds 4)
if [ -n "${SMOKE:-}" ]; then
  ops=(--model "${MODELS:-conv_small,hybrid_medium}" --resolution 64 --repeats 1 --seconds 1)
  pareto=(--threads 1 --repeats 1 --seconds 1 --resolution 64)
fi
[ -z "${LIMIT:-}" ] || ops+=(--limit "$LIMIT")
[ $# -gt 0 ] ||
  set -- all-1 all-2 MobileNetV4 MobileNetV1,MobileNetV2,MobileNetV3 EfficientNet,EfficientNet-Lite,ConvNeXt
for step in "$@"; do
  case $step in
    *-[1-9]*)
      "$command" bench --ops "${step%-*}" --threads "${step##*-}" "${ops[@]}" --peers "$peers" --keep \
        --json "$results/${name}_ops.json" --markdown "$results/${name}_ops.md"
      ;;
    *)
      "$command" pareto --family "$step" "${pareto[@]}" --keep \
        --json "$results/${name}_pareto.json" --markdown "$results/${name}_pareto.md"
      ;;
  esac
done
