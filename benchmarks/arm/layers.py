"""The layers that are counted: conv_small and conv_medium block by block, each of their depthwise layers alone, and the
attention blocks of the hybrid models.

    MNV4_OPS_SKIP_NATIVE=1 python benchmarks/arm/layers.py > benchmarks/arm/layers.json

`line` is what the driver reads (layers.cpp), `graph` the same layer for XNNPACK (xnnpack_models.py): steps
[kind, kernel, stride, channels, act] with kind "conv" or "depthwise"; of an attention block, what its spec says.
"""

from __future__ import annotations

import json
from typing import Any

from mnv4_ops.spec import ConvSpec, FusedIBSpec, MQASpec, UIBSpec, head_spec, ledger

ACTS = ("none", "relu", "relu6", "gelu")
Step = tuple[str, int, int, int, str]


def _layer(group: str, c_in: int, steps: dict[int, Step], residual: bool, height: int, width: int) -> dict[str, Any]:
    """`steps` by stage: 0 start depthwise, 1 expand, 2 mid depthwise, 3 project."""
    c_mid = steps[1][3] if 1 in steps else c_in
    c_out = steps[3][3] if 3 in steps else c_mid
    start, expand, mid = (steps.get(i, ("", 0 if i != 1 else 1, 1, 0, "none")) for i in (0, 1, 2))
    acts = [ACTS.index(steps[i][4]) if i in steps else 0 for i in range(4)]
    numbers = [c_in, c_mid, c_out, start[1], start[2], int(1 in steps), expand[1], expand[2], mid[1], mid[2]]
    numbers += [int(3 in steps), int(residual), 0, *acts, height, width]
    return {
        "group": group,
        "line": " ".join(["block", *map(str, numbers)]),
        "graph": {"input": [height, width, c_in], "steps": [steps[i] for i in sorted(steps)], "residual": residual},
    }


def layers(model: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    depthwise: dict[str, dict[str, Any]] = {}
    for entry in ledger(model):
        spec, h, w = entry.spec, entry.height, entry.width
        steps: dict[int, Step] = {}
        if isinstance(spec, UIBSpec):
            h1, w1 = h, w
            if spec.start_kernel:
                stride = 1 if spec.mid_kernel else spec.stride
                steps[0] = ("depthwise", spec.start_kernel, stride, spec.c_in, "none")
                alone = ("depthwise", spec.start_kernel, stride, spec.c_in, "relu")
                name = f"depthwise {spec.start_kernel}x{spec.start_kernel} stride {stride}, {spec.c_in} x {h} x {w}"
                depthwise[name] = _layer("depthwise", spec.c_in, {0: alone}, False, h, w)
            steps[1] = ("conv", 1, 1, spec.c_mid, spec.act)
            if spec.mid_kernel:
                steps[2] = ("depthwise", spec.mid_kernel, spec.stride, spec.c_mid, spec.act)
                name = f"depthwise {spec.mid_kernel}x{spec.mid_kernel} stride {spec.stride}, {spec.c_mid} x {h1} x {w1}"
                depthwise[name] = _layer("depthwise", spec.c_mid, {0: steps[2]}, False, h1, w1)
            steps[3] = ("conv", 1, 1, spec.c_out, "none")
            group, residual = "UIB", spec.residual
        elif isinstance(spec, FusedIBSpec):
            steps[1] = ("conv", spec.kernel, spec.stride, spec.c_mid, spec.act)
            steps[3] = ("conv", 1, 1, spec.c_out, "none")
            group, residual = "dense", spec.residual
        elif isinstance(spec, ConvSpec) and not spec.depthwise:
            steps[1] = ("conv", spec.kernel, spec.stride, spec.c_out, spec.act)
            group, residual = ("1x1" if spec.kernel == 1 else "dense"), False
            group = "one pixel" if h * w == 1 else group
        else:
            continue
        name = f"{entry.name} {spec.kind} {spec.channels[0]}-{spec.channels[-1]} x {h} x {w}"
        found[name] = _layer(group, spec.channels[0], steps, residual, h, w)
    unique: dict[str, dict[str, Any]] = {}
    for name, layer in found.items():  # blocks of the same shape once
        if layer["line"] not in {other["line"] for other in unique.values()}:
            unique[name] = layer
    return unique | depthwise


def attentions(model: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in ledger(model):
        s, h, w = entry.spec, entry.height, entry.width
        if not isinstance(s, MQASpec):
            continue
        assert s.norm
        assert s.query_stride == 1
        assert s.padding == "symmetric"
        numbers = [s.c, s.heads, s.key_dim, s.value_dim, s.kv_kernel, s.kv_stride, int(s.residual), h, w]
        graph = {"input": [h, w, s.c], "heads": s.heads, "key_dim": s.key_dim, "value_dim": s.value_dim}
        graph |= {"kv_kernel": s.kv_kernel, "kv_stride": s.kv_stride, "residual": s.residual}
        line = " ".join(["mqa", *map(str, numbers)])
        if line not in {other["line"] for other in found.values()}:  # blocks of the same shape once
            name = f"{entry.name} MQA {s.c} x {h} x {w}, {s.heads} heads of {s.key_dim}, kv stride {s.kv_stride}"
            found[name] = {"group": "MQA", "line": line, "graph": graph}
    return found


def model_lines(model: str) -> list[str]:
    """The whole model for the driver: its blocks in order, then the head."""
    lines = []
    for entry in ledger(model):
        one = [v for v in [_entry_line(entry)] if v]
        lines += one
    head = head_spec(model)
    last = next(e for e in ledger(model) if e.name == "4.0")
    relu = ACTS.index(head.act)
    numbers = [head.c_in, head.c_feat, head.c_hidden, head.classes, relu, relu, last.height, last.width]
    return [*lines, " ".join(["head", *map(str, numbers)])]


def _entry_line(entry: Any) -> str:
    if entry.name in ("4.0", "pool", "conv_head", "classifier"):
        return ""  # the head's
    name = f"{entry.name} {entry.spec.kind} "
    key = (entry.spec, entry.height, entry.width)
    for other in ledger(entry.model):  # the first block of this shape has the line
        if (other.spec, other.height, other.width) == key:
            name = f"{other.name} {other.spec.kind} "
            break
    return next(str(layer["line"]) for n, layer in layers(entry.model).items() if n.startswith(name))


if __name__ == "__main__":
    counted: dict[str, Any] = {m: {"layers": layers(m), "model": model_lines(m)} for m in ("conv_small", "conv_medium")}
    counted |= {m: {"layers": attentions(m), "model": []} for m in ("hybrid_medium", "hybrid_large")}
    print(json.dumps(counted, indent=1))
