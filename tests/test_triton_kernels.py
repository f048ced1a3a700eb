"""The Triton kernels: small shapes in the interpreter everywhere, the same and the whole ledger on an NVIDIA GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mnv4_ops.spec import MODELS

HERE = Path(__file__).parent
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for an NVIDIA GPU"),
    pytest.mark.no_poison,
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def run_lines(program: str, *args: str, **environment: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(HERE / program), *args],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (done.stderr[-2000:], [line for line in lines if not line.get("ok", True)])
    return lines


@pytest.mark.slow
def test_small_blocks_in_the_interpreter() -> None:
    # a process of its own: the interpreter is chosen when triton is imported
    lines = run_lines("triton_cases.py", "cpu", TRITON_INTERPRET="1")
    assert lines[-1] == {"failed": 0}
    assert len(lines) > 50


def test_importing_the_package_does_not_import_triton(tmp_path: Path) -> None:
    code = "import sys, mnv4_ops.triton_kernels; assert 'triton' not in sys.modules"
    # elsewhere: here the bare source tree would be imported
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start_kernel": 7}, "start_kernel"),
        ({"mid_stride": 3, "mid_kernel": 3}, "mid_stride"),
        ({"expand_act": "swish"}, "expand_act"),
        ({"padding": "valid"}, "padding"),
        ({"c_mid": 0}, "c_mid"),
        ({"residual": True}, "residual"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
def test_unsupported_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    from mnv4_ops.triton_kernels import Block

    given = {
        "dtype": torch.float32,
        "device": "cpu",
        "c_in": 8,
        "c_mid": 16,
        "c_out": 12,
        "expand": True,
        "project": True,
    }
    with pytest.raises(ValueError, match=message):
        Block(**{**given, **wrong})


def test_an_unpacked_stage_is_an_error() -> None:
    from mnv4_ops.triton_kernels import Block

    block = Block(dtype=torch.float32, device="cpu", c_in=8, c_mid=8, c_out=12, project=True)
    with pytest.raises(RuntimeError, match="missing \\[3\\]"):
        block.run(torch.zeros(1, 8, 2, 2), torch.zeros(1, 12, 2, 2))
    with pytest.raises(ValueError, match="stage"):
        block.pack(0, torch.zeros(8, 1, 3, 3))


def test_packing_again_keeps_the_memory() -> None:
    from mnv4_ops.triton_kernels import Block

    block = Block(dtype=torch.float16, device="cpu", c_in=8, c_mid=8, c_out=12, project=True)
    block.pack(3, torch.zeros(12, 8, 1, 1).half())
    before = [t.data_ptr() for t in block.packed[3].tensors]
    block.pack(3, torch.ones(12, 8, 1, 1).half())
    assert [t.data_ptr() for t in block.packed[3].tensors] == before
    assert block.packed[3].w[:8, :12].eq(1).all()


def test_to_tf32_rounds_to_the_nearest() -> None:
    from mnv4_ops.triton_kernels.plan import to_tf32

    x = torch.randn(10000) * 2.0 ** torch.randint(-40, 40, (10000,))
    unit = 2.0 ** (x.abs().log2().floor() - 10)
    got = to_tf32(x)
    assert ((got - x).abs() <= unit / 2).all()
    assert (got / unit).frac().eq(0).all()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1 + 2.0**-11, -1 - 2.0**-11])
    assert to_tf32(special).tolist() == [0.0, -0.0, float("inf"), -float("inf"), 1 + 2.0**-10, -1 - 2.0**-10]
    assert to_tf32(torch.tensor([float("nan")])).isnan().all()


def test_the_rounded_matrix_follows_the_packed_one() -> None:
    from mnv4_ops.triton_kernels.plan import Packed, to_tf32

    packed = Packed(12, 8, 1, False, torch.float32, "cpu")
    for seed in range(2):
        weight = torch.randn(12, 8, 1, 1, generator=torch.Generator().manual_seed(seed))
        packed.fill(weight, None, None, None, None, None, 0.0, None)
        matrix = packed.matrix("tf32")
        assert torch.equal(matrix, to_tf32(packed.w))
        assert not torch.equal(matrix, packed.w)
        assert packed.matrix("ieee") is packed.w
    assert matrix.data_ptr() == packed.matrix("tf32").data_ptr()


@pytest.mark.parametrize("structure", ["pointwise", "ConvNext", "FusedIB", "stem"])
def test_operands_are_rounded_for_tf32(structure: str, tmp_path: Path) -> None:
    """The interpreter multiplies in fp32: rounded operands show as errors far above fp32's and not above tf32's."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from triton_cases import Case, run_case, structures
torch.manual_seed(0)
case = Case(torch.float32, "cpu", **structures("relu", 24, 48, 32)[sys.argv[2]])
print(*run_case(case, 2, 9, 8), *run_case(case, 2, 9, 8, allow_tf32=1))
"""
    command = [sys.executable, "-c", code, str(HERE), structure]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, _, rounded, _ = map(float, done.stdout.split())
    assert plain <= 1
    if structure == "stem":
        # few channels stay in fp32
        assert rounded <= 1
    else:
        # units of fp32's error; 2 ** 13 between the two formats, and fewer roundings
        assert 100 < rounded < 2**13


def test_tables_are_well_formed() -> None:
    from mnv4_ops.triton_kernels import config

    for path in config.TUNED.glob("*.json"):
        for sizes in json.loads(path.read_text()).get("entries", {}).values():
            for size, choice in sizes.items():
                assert len(size.split("x")) == 3
                assert choice["ops"]


# what was measured where: dtype, models, whether their attention blocks too
MEASURED = {
    "nvidia_h100_80gb_hbm3": {"float16": (("conv_small", "conv_medium", "conv_large", "hybrid_medium"), True)},
    "nvidia_h200": {
        "float16": (("hybrid_medium", "hybrid_large"), True),
        "bfloat16": (tuple(MODELS), False),
        "float32": (tuple(MODELS), False),
        "float32_tf32": (tuple(MODELS), False),
    },
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_table_holds_what_it_claims(name: str) -> None:
    """Every block of the models in every batch bucket, nothing else; every entry can be planned."""
    sys.path.append(str(HERE.parent / "benchmarks"))
    from gpu_blocks import blocks
    from gpu_mqa import describe
    from mnv4_ops.triton_kernels import config
    from mnv4_ops.triton_kernels.tuner import make

    from mnv4_ops.bench import gpu_mqa

    table = json.loads((config.TUNED / f"{name}.json").read_text())["entries"]
    missing, used = [], 0
    for label, (models, attention) in MEASURED[name].items():
        jobs = [(desc, h, w) for desc, h, w, _ in blocks(list(models)).values()]
        if attention:
            jobs += [(describe(spec), h, w) for spec, h, w in gpu_mqa.blocks().values()]
        dtype = getattr(torch, label.removesuffix("_tf32"))
        for desc, h, w in jobs:
            runner = make(desc, dtype, "cpu")
            sizes = table.get(f"{label} {runner.key}", {})
            for batch in config.BUCKETS:
                choice = sizes.get(f"{batch}x{h}x{w}")
                if choice is None:
                    missing.append((label, runner.key, batch))
                    continue
                used += 1
                assert choice["us"] > 0
                # large batches are taken in chunks
                launches = runner.plan(batch, h, w, choice, label.endswith("_tf32")).launches
                assert len(launches) % len(choice["ops"]) == 0
    assert used == sum(map(len, table.values()))
    assert not missing


@pytest.mark.parametrize(("structure", "kind"), [("stem", "sliced"), ("ExtraDW", "channels_last")])
def test_chunks_of_a_batch_give_the_same(structure: str, kind: str, tmp_path: Path) -> None:
    """Scratch above the limit makes chunks, also of an input that is read by its strides."""
    desc: dict[str, Any] = (
        {"c_in": 4, "c_mid": 24, "c_out": 16, "expand": True, "expand_kernel": 3, "expand_stride": 2, "project": True}
        if structure == "stem"
        else {
            "c_in": 16, "c_mid": 32, "c_out": 16, "start_kernel": 3, "expand": True, "mid_kernel": 3, "project": True,
            "residual": True,
        }
    )  # fmt: skip
    run = """
import sys, torch
from mnv4_ops.triton_kernels import block as module
from mnv4_ops.triton_kernels.block import Block
torch.manual_seed(0)
desc, kind = eval(sys.argv[1]), sys.argv[2]
b = Block(dtype=torch.float32, device="cpu", **desc)
for stage, p in b.packed.items():
    b.pack(stage, torch.randn(p.c_out, 1 if p.depthwise else p.c_in, p.kernel, p.kernel))
choice = b.by_formula(5, 8, 8, True)
if kind == "sliced":
    choice = {"fused": False, "chunk": 0, "ops": [b._formula(op, 5, 8, 8, True) for op in b.ops]}
b.choice = choice
x = torch.randn(10, desc["c_in"], 8, 8)
x = x[::2] if kind == "sliced" else x[:5].contiguous(memory_format=torch.channels_last)
outs, launches = [], []
for limit in (1 << 40, 4096):
    module.SCRATCH = limit
    b._plans.clear()
    out = torch.full(b.output_shape(5, 8, 8), float("nan")).to(memory_format=torch.channels_last)
    b.run(x, out)
    outs.append(out)
    launches.append(len(next(iter(b._plans.values())).launches))
assert torch.equal(*outs), (outs[0] - outs[1]).abs().max()
assert launches[1] > launches[0], launches
assert outs[0].isfinite().all()
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", run, repr(desc), kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def _ledger() -> list[Any]:
    sys.path.append(str(HERE.parent / "benchmarks"))
    from gpu_blocks import blocks

    return [
        pytest.param(desc, h, w, id=f"{i}-{h}x{w}") for i, (desc, h, w, _) in enumerate(blocks(list(MODELS)).values())
    ]


class TestOnGpu:
    pytestmark = gpu

    def test_small_blocks(self) -> None:
        assert run_lines("triton_cases.py", "cuda")[-1] == {"failed": 0}

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("desc", "h", "w"), _ledger())
    @pytest.mark.parametrize("batch", [1, 64])
    def test_ledger(self, desc: dict[str, Any], h: int, w: int, batch: int, dtype: torch.dtype) -> None:
        from triton_cases import Case, run_case

        if batch > 1:
            h, w = min(h, 32), min(w, 32)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        worst, rms = run_case(Case(dtype, "cuda", **desc), batch, h, w)
        assert worst <= 1
        assert rms <= 1

    @pytest.mark.parametrize(("desc", "h", "w"), _ledger()[::4])
    def test_tf32(self, desc: dict[str, Any], h: int, w: int) -> None:
        """Operands are rounded as cuDNN rounds them; also after another fill of the packed matrices."""
        from triton_cases import Case, run_case

        case = Case(torch.float32, "cuda", **desc)
        block = case.build()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            assert max(run_case(case, 2, h, w, block=block, allow_tf32=1)) <= 1
            case = Case(torch.float32, "cuda", **desc)
            case.pack(block)
            assert max(run_case(case, 2, h, w, block=block, allow_tf32=1)) <= 1

    def test_graph_sees_new_weights(self) -> None:
        from triton_cases import Case, ib, output

        case = Case(torch.float16, "cuda", **ib(64, 128, 64, start_kernel=3, mid_kernel=5, residual=True))
        block = case.build()
        x = torch.randn(8, 64, 14, 14, device="cuda").half().to(memory_format=torch.channels_last)
        out = output(block, 8, 14, 14, torch.float16, "cuda")
        block.run(x, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            block.run(x, out)
        other = Case(torch.float16, "cuda", **case.desc)
        other.pack(block)
        graph.replay()
        want = other.reference(x, torch.float64)
        assert float((out.double() - want).norm() / want.norm()) < 4e-3
