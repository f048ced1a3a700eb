"""Specs and the ledger, against the counts in facts.md section 3 (made from timm with forward hooks, independently)."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mnv4_ops import spec as S
from mnv4_ops.spec import ConvSpec, FusedIBSpec, HeadSpec, LinearSpec, MQASpec, PoolSpec, UIBSpec, ledger

# totals at the standard resolution: MMAC, thousands of parameters
TOTALS = {
    "conv_small": (224, 186.0, 3774.0),
    "conv_medium": (256, 1080.2, 9715.5),
    "conv_large": (384, 6376.2, 32590.9),
    "hybrid_medium": (256, 1271.2, 11074.6),
    "hybrid_large": (384, 7711.9, 37764.6),
}

# section 3.7: GMAC at the standard resolution, params M, params M without BN affine
COUNTED = {
    "conv_small": (0.1860, 3.774, 3.749),
    "conv_medium": (1.0802, 9.716, 9.648),
    "conv_large": (6.3762, 32.591, 32.441),
    "hybrid_medium": (1.2712, 11.075, 10.999),
    "hybrid_large": (7.7119, 37.765, 37.600),
}

# section 3.7: GMAC at other resolutions
OTHER = {
    "conv_small": {256: 0.2422, 320: 0.3770},
    "conv_medium": {224: 0.8276, 320: 1.6865, 384: 2.4274},
    "conv_large": {256: 2.8353, 320: 4.4287, 448: 8.6778},
    "hybrid_medium": {224: 0.9663, 320: 2.0217, 384: 2.9750, 448: 4.1528},
    "hybrid_large": {448: 10.6628},
}

# section 4: block-fused activation traffic in millions of elements, at the standard resolution
TRAFFIC = {"conv_small": 2.01, "conv_medium": 3.11, "conv_large": 8.61, "hybrid_medium": 3.60, "hybrid_large": 10.23}

# section 4: blocks by kind
KINDS = {
    "conv_small": {"IB": 8, "ExtraDW": 3, "ConvNext": 1},
    "conv_medium": {"ExtraDW": 13, "ConvNext": 4, "FFN": 4, "FusedIB": 1},
    "conv_large": {"ExtraDW": 19, "ConvNext": 7, "FusedIB": 1},
    "hybrid_medium": {"ExtraDW": 13, "ConvNext": 5, "FFN": 4, "MQA": 8, "FusedIB": 1},
    "hybrid_large": {"ExtraDW": 19, "ConvNext": 8, "MQA": 8, "FusedIB": 1},
}

# sections 3.1 to 3.5, "name kind height channels MMAC kparams"; every row of Conv-S, the telling rows of the others
ROWS = {
    "conv_small": """
        stem Conv3x3 224 3 10.84 0.9
        0.0 Conv3x3 112 32 28.90 9.3
        0.1 Conv1x1 56 32 3.21 1.1
        1.0 Conv3x3 56 32 21.68 27.8
        1.1 Conv1x1 28 96 4.82 6.3
        2.0 ExtraDW 28 64 15.44 38.2
        2.1 IB 14 96 7.56 39.6
        2.2 IB 14 96 7.56 39.6
        2.3 IB 14 96 7.56 39.6
        2.4 IB 14 96 7.56 39.6
        2.5 ConvNext 14 96 14.62 75.7
        3.0 ExtraDW 14 96 14.87 137.8
        3.1 ExtraDW 7 128 7.21 149.6
        3.2 IB 7 128 7.05 146.2
        3.3 IB 7 128 5.29 109.7
        3.4 IB 7 128 6.65 138.0
        3.5 IB 7 128 6.65 138.0
        4.0 Conv1x1 7 128 6.02 124.8
        pool AvgPool 7 960 0 0
        conv_head Conv1x1 1 960 1.23 1231.4
        classifier Linear 1 1280 1.28 1281.0""",
    "conv_medium": """
        stem Conv3x3 256 3 14.16 0.9
        0.0 FusedIB 128 32 176.16 43.4
        1.0 ExtraDW 64 48 60.16 30.8
        1.1 ExtraDW 32 80 28.43 28.7
        2.0 ExtraDW 32 80 62.79 130.3
        2.3 ExtraDW 16 160 56.89 225.4
        2.5 ConvNext 16 160 52.80 208.2
        2.6 FFN 16 160 26.21 103.4
        3.0 ExtraDW 16 160 57.61 432.0
        3.6 ExtraDW 8 256 17.74 280.3
        3.9 FFN 8 256 33.55 526.8
        3.10 ConvNext 8 256 17.19 270.6""",
    "conv_large": """
        stem Conv3x3 384 3 23.89 0.7
        0.0 FusedIB 192 24 233.57 25.6
        1.0 ExtraDW 96 48 142.44 33.9
        2.0 ExtraDW 48 96 134.92 123.2
        2.5 ExtraDW 24 192 176.62 310.5
        2.10 ConvNext 24 192 170.86 298.9
        3.0 ExtraDW 24 192 147.09 569.2
        3.5 ExtraDW 12 512 306.49 2138.6
        3.12 ConvNext 12 512 303.83 2116.1
        4.0 Conv1x1 12 512 70.78 493.4""",
    "hybrid_medium": """
        1.0 ExtraDW 64 48 60.16 30.9
        2.1 FFN 16 160 26.21 103.5
        2.4 MQA 16 160 30.86 106.4
        2.9 ExtraDW 16 160 54.27 215.4
        2.10 MQA 16 160 30.86 106.4
        2.11 ConvNext 16 160 52.80 208.3
        3.4 FFN 8 256 16.78 263.9
        3.8 MQA 8 256 12.58 164.6
        3.11 ExtraDW 8 256 35.60 561.7
        3.15 ConvNext 8 256 33.96 534.0""",
    "hybrid_large": """
        2.6 ExtraDW 24 192 176.62 310.7
        2.7 MQA 24 192 151.79 170.7
        2.13 MQA 24 192 151.79 170.7
        2.14 ConvNext 24 192 170.86 299.1
        3.0 ExtraDW 24 192 147.09 569.7
        3.10 MQA 12 512 106.17 591.4
        3.16 MQA 12 512 106.17 591.4
        3.17 ConvNext 12 512 303.83 2116.6""",
}


@pytest.mark.parametrize("model", TOTALS)
def test_ledger_totals(model: str) -> None:
    side, mmac, kparams = TOTALS[model]
    rows = ledger(model)
    assert S.standard_resolution(model) == side
    macs, params = sum(r.macs for r in rows), sum(r.params for r in rows)
    assert round(macs / 1e6, 1) == mmac
    assert round(params / 1e3, 1) == kparams
    gmac, params_m, without_bn = COUNTED[model]
    assert round(macs / 1e9, 4) == gmac
    assert round(params / 1e6, 3) == params_m
    bn_affine = 2 * sum(r.spec.biases() for r in rows if not isinstance(r.spec, LinearSpec))
    assert round((params - bn_affine) / 1e6, 3) == without_bn


@pytest.mark.parametrize(("model", "side"), [(m, s) for m, sides in OTHER.items() for s in sides])
def test_ledger_other_resolutions(model: str, side: int) -> None:
    assert round(sum(r.macs for r in ledger(model, side)) / 1e9, 4) == OTHER[model][side]


@pytest.mark.parametrize("model", ROWS)
def test_ledger_rows(model: str) -> None:
    rows = {r.name: r for r in ledger(model)}
    for line in ROWS[model].strip().splitlines():
        name, kind, height, channels, mmac, kparams = line.split()
        row = rows[name]
        got = (row.spec.kind, row.height, row.width, row.spec.channels[0])
        assert got == (kind, int(height), int(height), int(channels)), name
        assert round(row.macs / 1e6, 2) == float(mmac), name
        assert round(row.params / 1e3, 1) == float(kparams), name


@pytest.mark.parametrize("model", KINDS)
def test_ledger_kinds_and_traffic(model: str) -> None:
    rows = ledger(model)
    kinds = Counter(r.spec.kind for r in rows)
    assert {k: n for k, n in kinds.items() if "Conv" not in k or k == "ConvNext"} == {
        **KINDS[model],
        "AvgPool": 1,
        "Linear": 1,
    }
    weights = sum(r.spec.weights() + r.spec.biases() for r in rows)
    traffic = sum(r.bytes() for r in rows) / 4 - weights
    # hybrid_large is 10.2352 here
    assert traffic / 1e6 == pytest.approx(TRAFFIC[model], abs=0.0055)


def test_ledger_selection() -> None:
    assert tuple(dict.fromkeys(r.model for r in ledger())) == S.MODELS == tuple(TOTALS)
    assert ledger("mobilenetv4_conv_small.e2400_r224_in1k") == ledger("conv_small")
    assert ledger(["conv_small", "conv_large"]) == ledger("conv_small") + ledger("conv_large")
    assert [r.name for r in ledger("conv_small", classes=0)][-2:] == ["pool", "conv_head"]
    odd = {r.name: (r.height, r.width) for r in ledger("conv_small", (97, 65))}
    assert (odd["stem"], odd["0.0"], odd["4.0"], odd["conv_head"]) == ((97, 65), (49, 33), (4, 3), (1, 1))
    assert all(r.spec.padding == "same" for r in ledger("hybrid_large", padding="same") if hasattr(r.spec, "padding"))
    with pytest.raises(ValueError, match=r"model: expected one of conv_small, .*got 'conv_tiny'"):
        ledger("conv_tiny")
    with pytest.raises(ValueError, match="at least 1 x 1 pixels, got 0"):
        ledger("conv_small", 0)


def test_widths() -> None:
    stem = {m: dict(S.model_specs(m))["stem"].channels[1] for m in S.VARIANTS}
    # timm keeps the stem of widths below 1
    assert stem["conv_small_035"] == stem["conv_small"] == 32
    assert stem["hybrid_large_075"] == stem["hybrid_large"] == 24
    assert dict(S.model_specs("conv_small_035"))["4.0"].channels == (48, 336)
    assert dict(S.model_specs("hybrid_medium_075"))["2.4"] == MQASpec(
        120, 4, 64, 64, kv_stride=2, residual=True, layer_scale=True
    )


def test_head_spec_is_the_last_rows() -> None:
    for model in S.VARIANTS:
        head = S.head_spec(model)
        rows = [r for r in ledger(model) if r.name in ("4.0", "pool", "conv_head", "classifier")]
        assert head.macs(rows[0].height, rows[0].width) == sum(r.macs for r in rows)
        assert head.params() == sum(r.params for r in rows)
        assert head.features == 1000
    assert HeadSpec(128, 960, 1280, 0).features == 1280
    assert HeadSpec(128, 960, 0, 0).features == 960
    assert HeadSpec(128, 0, 0, 0).features == 128
    assert HeadSpec(128, 0, 0, 0).params() == 0


@pytest.mark.parametrize(
    ("start", "mid", "kind", "strides"),
    [(3, 5, "ExtraDW", (1, 2)), (0, 5, "IB", (1, 2)), (5, 0, "ConvNext", (2, 1)), (0, 0, "FFN", (1, 1))],
)
def test_uib_kinds_and_stride(start: int, mid: int, kind: str, strides: tuple[int, int]) -> None:
    spec = UIBSpec(16, 64, 24, start, mid, stride=max(strides))
    assert (spec.kind, spec.start_stride, spec.mid_stride) == (kind, *strides)


def test_query_stride_counts() -> None:
    spec = MQASpec(32, 4, 16, 8, kv_stride=2, query_stride=2)
    query, keys = 8 * 8, 8 * 8
    assert spec.out_hw(16, 16) == (16, 16)
    assert spec.macs(16, 16) == (
        query * 32 * 64 + 2 * keys * 32 * 9 + keys * 32 * 24 + query * keys * 4 * 24 + 256 * 32 * 32
    )
    assert spec.params() == 32 * 64 + 2 * 32 * 9 + 32 * 24 + 32 * 32 + 4 * 2 * 32
    assert spec.query_hw(9, 9) == (4, 4)
    assert dataclasses.replace(spec, padding="same").query_hw(9, 9) == (5, 5)


def test_bytes() -> None:
    spec = ConvSpec(3, 32, 3, 2)
    io = 3 * 224 * 224 + 32 * 112 * 112
    assert spec.bytes(224, 224) == 4 * (io + 864 + 32)
    half = spec.with_dtype("float16")
    assert (half.dtype, half.compute_dtype, half.out_dtype) == ("float16", "float32", "float16")
    assert half.bytes(224, 224, batch=8) == 2 * (8 * io + 864) + 4 * 32
    assert spec.with_dtype("float64").compute_dtype == "float64"


def test_pad_before_after() -> None:
    # facts.md section 1: on even sizes at stride 2 TF pads k3 (0, 1) and k5 (1, 2)
    assert S.pad_before_after(8, 3, 2, "same") == (0, 1)
    assert S.pad_before_after(8, 5, 2, "same") == (1, 2)
    assert S.pad_before_after(9, 3, 2, "same") == (1, 1)
    assert S.pad_before_after(7, 5, 1, "same") == S.pad_before_after(7, 5, 1, "symmetric") == (2, 2)
    assert S.pad_before_after(7, 1, 2, "same") == (0, 0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UIBSpec(0, 8, 8), ValueError, r"UIBSpec: expected c_in >= 1, got 0"),
        (lambda: UIBSpec(8, 8.0, 8), TypeError, r"UIBSpec: expected c_mid to be an int, got 8\.0"),
        (lambda: UIBSpec(8, 8, 8, start_kernel=7), ValueError, r"start_kernel in \{0, 3, 5\}, got 7"),
        (lambda: UIBSpec(8, 8, 8, mid_kernel=1), ValueError, r"mid_kernel in \{0, 3, 5\}, got 1"),
        (lambda: UIBSpec(8, 8, 8, 3, stride=3), ValueError, r"stride in \{1, 2\}, got 3"),
        (lambda: UIBSpec(8, 8, 8, 3, stride=True), ValueError, r"stride in \{1, 2\}, got True"),
        (lambda: UIBSpec(8, 8, 8, stride=2), ValueError, r"stride 1 without a depthwise convolution.*got 2"),
        (lambda: UIBSpec(8, 8, 8, act="silu"), ValueError, r"act in \{none, relu, relu6, gelu\}, got 'silu'"),
        (lambda: UIBSpec(8, 8, 8, padding="valid"), ValueError, r"padding in \{symmetric, same\}, got 'valid'"),
        (lambda: UIBSpec(8, 8, 9, residual=True), ValueError, r"residual expected .*c_in 8, c_out 9"),
        (lambda: UIBSpec(8, 8, 8, 3, stride=2, residual=True), ValueError, r"residual expected stride 1"),
        (lambda: UIBSpec(8, 8, 8, residual=1), TypeError, r"residual to be a bool, got 1"),
        (lambda: UIBSpec(8, 8, 8, dtype="int8"), ValueError, r"UIBSpec: expected dtype in \{float64.*got 'int8'"),
        (lambda: FusedIBSpec(8, 8, 8, kernel=2), ValueError, r"FusedIBSpec: expected kernel in \{1, 3, 5, 7\}, got 2"),
        (lambda: FusedIBSpec(8, 8, 16, residual=True), ValueError, r"FusedIBSpec: residual expected"),
        (lambda: ConvSpec(8, 16, 3, depthwise=True), ValueError, r"ConvSpec: expected c_out == c_in == 8 .*got 16"),
        (lambda: MQASpec(8, 0, 8, 8), ValueError, r"MQASpec: expected heads >= 1, got 0"),
        (lambda: MQASpec(8, 2, 8, 8, kv_stride=3), ValueError, r"MQASpec: expected kv_stride in \{1, 2\}, got 3"),
        (lambda: HeadSpec(8, -1, 0, 0), ValueError, r"HeadSpec: expected c_feat >= 0, got -1"),
        (lambda: LinearSpec(8, 0), ValueError, r"LinearSpec: expected c_out >= 1, got 0"),
        (lambda: UIBSpec(8, 8, 8).macs(0, 4), ValueError, r"UIBSpec: expected an input of at least 1 x 1 .*got 0 x 4"),
    ],
)
def test_validation(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_specs_are_frozen_hashable_and_pickle() -> None:
    rows = ledger("hybrid_medium")
    assert pickle.loads(pickle.dumps(rows)) == rows
    assert len({r.spec for r in rows}) < len(rows)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PoolSpec(8).c = 9  # type: ignore[misc]


def test_spec_needs_no_torch() -> None:
    # the package is stubbed, so that only spec and what it imports are loaded
    root = Path(S.__file__).parent
    code = (
        "import sys, types; p = sys.modules['mnv4_ops'] = types.ModuleType('mnv4_ops')\n"
        f"p.__path__ = [{str(root)!r}]\n"
        "from mnv4_ops.spec import ledger; ledger()\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
