#!/usr/bin/env bash
# Op tables and Pareto front of this machine into benchmarks/results: about twelve minutes on two quiet cores.
# usage: benchmarks/x86.sh [path of mnv4-ops] [step...]
# Steps take at most four minutes each, for machines that are not quiet for longer; all of them without a step. One measured again
# replaces its rows. SMOKE=1: small sizes and one round, to see that it runs. $RESULTS: another folder.
set -euo pipefail
command=${1:-mnv4-ops}
shift || true
results=${RESULTS:-$(cd "$(dirname "$0")" && pwd)/results}
peers=torch_eager,torch_eager_cl,onnxruntime,openvino,xnnpack
ops=(--model all --repeats 7 --seconds 1)
pareto=(--threads 1 --repeats 5 --seconds 4)
if [ -n "${SMOKE:-}" ]; then
  ops=(--model conv_small,hybrid_medium --resolution 64 --repeats 1 --seconds 1)
  pareto=(--threads 1 --repeats 1 --seconds 1 --resolution 64)
fi

measure_ops() { # measure_ops THREADS OPS
  "$command" bench --ops "$2" --threads "$1" "${ops[@]}" --peers "$peers" --keep \
    --json "$results/x86_ops.json" --markdown "$results/x86_ops.md"
}

measure_front() { # measure_front FAMILIES
  "$command" pareto --family "$1" "${pareto[@]}" --keep --json "$results/x86_pareto.json" --markdown "$results/x86_pareto.md"
}

[ $# -gt 0 ] || set -- convolutions-1 blocks-1 convolutions-2 blocks-2 mobilenetv4 others
for step in "$@"; do
  case $step in
    convolutions-[12]) measure_ops "${step#*-}" pointwise,depthwise,depthwise_pointwise,dense ;;
    blocks-[12]) measure_ops "${step#*-}" extra_dw,ib,convnext,ffn,fused_ib,mqa_attention,mqa,head ;;
    mobilenetv4) measure_front MobileNetV4 ;;
    others) measure_front MobileNetV1,MobileNetV2,MobileNetV3,EfficientNet,EfficientNet-Lite,ConvNeXt ;;
    *) echo "benchmarks/x86.sh: no step $step" >&2; exit 2 ;;
  esac
done
