"""The Triton kernels of Mobile MQA: small shapes in the interpreter everywhere, all of the hybrids on an NVIDIA GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_triton_kernels import DTYPES, gpu, run_lines
from triton_mqa_cases import MQACase, attention_inputs, choices, judge, run_attention, run_mqa, spec

from mnv4_ops.spec import MQASpec, ledger


@pytest.mark.slow
def test_small_blocks_in_the_interpreter() -> None:
    # a process of its own: the interpreter is chosen when triton is imported
    lines = run_lines("triton_mqa_cases.py", "cpu", TRITON_INTERPRET="1")
    assert lines[-1] == {"failed": 0}
    assert len(lines) > 30


def test_the_shift_of_the_norm_does_not_fold_at_the_border() -> None:
    """The cases above see a kernel that folds it: so wrong is the result of one in float64."""
    s, size, _ = choices()["down"]
    case = MQACase(s, torch.float16, "cpu")
    x = torch.randn(size[0], s.c, *size[1:]).half()
    plain, truth = case.reference(x, torch.float16), case.reference(x, torch.float64)
    assert max(judge(case.naive(x).half(), plain, truth)) > 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_stride": 3}, "kv_stride"),
        ({"query_stride": 4}, "query_stride"),
        ({"kv_kernel": 7}, "kv_kernel"),
        ({"padding": "valid"}, "padding"),
        ({"heads": 0}, "heads"),
        ({"key_dim": 512}, "512"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
def test_unsupported_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    from mnv4_ops.triton_kernels import MobileMQA

    given = {"dtype": torch.float32, "device": "cpu", "c": 32, "heads": 2, "key_dim": 16, "value_dim": 16}
    with pytest.raises(ValueError, match=message):
        MobileMQA(**{**given, **wrong})


def test_stages_are_checked() -> None:
    case = MQACase(spec(kv_stride=2), torch.float32, "cpu")
    block = case.build()
    with pytest.raises(ValueError, match="stage"):
        block.pack(1, None, None, *case.params.norm[:4])
    with pytest.raises(ValueError, match="weight of stage 2"):
        block.pack(2, torch.zeros(47, 40, 1, 1))
    fresh = type(block)(dtype=torch.float32, device="cpu", c=32, heads=2, key_dim=16, value_dim=16)
    with pytest.raises(RuntimeError, match="missing"):
        fresh.run(torch.zeros(1, 32, 2, 2), torch.zeros(1, 32, 2, 2))


def test_packing_again_keeps_the_memory() -> None:
    block = MQACase(spec(kv_stride=2), torch.float16, "cpu").build()
    tensors = (block.w.w, block.w_out.w, block.w_out.affine, block.norms, block.taps)
    before = [(t.data_ptr(), t.clone()) for t in tensors]
    MQACase(spec(kv_stride=2), torch.float16, "cpu", seed=3).pack(block)
    assert [t.data_ptr() for t in tensors] == [address for address, _ in before]
    assert all(not torch.equal(t, old) for t, (_, old) in zip(tensors, before, strict=True))


def hybrid_shapes() -> dict[str, tuple[MQASpec, int]]:
    """Every distinct attention block of both hybrids at four resolutions: (spec, side)."""
    found = {}
    for model in ("hybrid_medium", "hybrid_large"):
        for resolution in (224, 256, 384, 448):
            for entry in ledger(model, resolution):
                if isinstance(entry.spec, MQASpec):
                    found[f"{model} {entry.height}"] = (entry.spec, entry.height)
    return found


@pytest.mark.parametrize("name", hybrid_shapes())
@pytest.mark.parametrize("batch", [1, 64])
def test_every_candidate_can_be_planned(name: str, batch: int) -> None:
    from mnv4_ops.triton_kernels import mqa_config, mqa_tune, tuner

    s, side = hybrid_shapes()[name]
    desc = {
        "c": s.c, "heads": s.heads, "key_dim": s.key_dim, "value_dim": s.value_dim, "kv_stride": s.kv_stride,
        "residual": True,
    }  # fmt: skip
    for dtype, tf32 in ((torch.float16, 0), (torch.float32, 0), (torch.float32, 1)):
        runner = tuner.make(desc, dtype, "cpu")
        first = mqa_config.formula(runner, batch, side, side, tf32)
        assert len(first["ops"]) <= 3
        seen = []
        for _, ops, lists in mqa_tune.variants(runner, batch, side, side, tf32, 132):
            assert len(ops) == len(lists) <= 3
            for place in range(max(map(len, lists))):
                configs = [options[min(place, len(options) - 1)] for options in lists]
                plan = runner.plan(batch, side, side, {"fused": True, "chunk": 0, "ops": configs}, tf32)
                assert len(plan.launches) == len(lists)
            seen += [cfg for options in lists for cfg in options]
        assert all(cfg in seen for cfg in first["ops"])


def test_what_does_not_fit_ends_with_three_small_kernels() -> None:
    from mnv4_ops.triton_kernels import mqa_config, tuner
    from mnv4_ops.triton_kernels.launch import OutOfResources

    desc = {"c": 256, "heads": 4, "key_dim": 64, "value_dim": 64, "residual": True}
    runner = tuner.make(desc, torch.float16, "cpu")
    plan = runner.plan(4, 8, 8, mqa_config.formula(runner, 4, 8, 8))
    for _ in range(100):
        try:
            plan = runner.plan(4, 8, 8, plan.smaller(0))
        except OutOfResources:
            break
    assert [cfg["path"] for cfg in plan.choice["ops"]] == ["mqa_project", "attention", "pointwise"]


def test_a_choice_of_another_size_gets_its_keys() -> None:
    """Entries serve blocks of as many pixels: fewer keys at once than there are made code that was wrong on Hopper."""
    from mnv4_ops.triton_kernels import mqa_config, tuner

    desc = {"c": 160, "heads": 4, "key_dim": 64, "value_dim": 64, "kv_stride": 2, "residual": True}
    runner = tuner.make(desc, torch.float16, "cpu")
    choice = mqa_config.formula(runner, 256, 16, 16)
    whole = choice["ops"][1]
    assert (whole["path"], whole["keys0"]) == ("mqa", 64)
    fitted = mqa_config.fitted(runner, choice, 28 * 28, 14 * 14)
    assert fitted is not None
    assert fitted["ops"][1]["keys0"] + fitted["ops"][1]["keys1"] >= 196
    runner.plan(32, 28, 28, fitted)
    with pytest.raises(ValueError, match="196 keys at once"):
        runner.plan(32, 28, 28, choice)
    with pytest.raises(ValueError, match="two stages"):
        runner.plan(256, 16, 16, {**choice, "ops": [choice["ops"][0], {**whole, "stages": 1}]})
    assert mqa_config.fitted(runner, choice, 64 * 64, 32 * 32) is None
    # more keys take the place of a third stage
    deep = {**choice, "ops": [choice["ops"][0], {**whole, "stages": 3}]}
    for side, keys, stages in ((16, 8, 3), (24, 12, 2)):
        found = mqa_config.fitted(runner, deep, side * side, keys * keys)
        assert found is not None
        assert found["ops"][1]["stages"] == stages


def test_pieces_of_keys_without_a_mask() -> None:
    from mnv4_ops.triton_kernels.attention_op import full_pieces

    sizes = ((64, 0, 64), (64, 0, 49), (128, 32, 144), (128, 32, 160), (128, 32, 100), (64, 0, 65))
    assert [full_pieces(*size) for size in sizes] == [1, 0, 1, 2, 0, 0]


class TestOnGpu:
    pytestmark = gpu

    def test_small_blocks(self) -> None:
        assert run_lines("triton_mqa_cases.py", "cuda")[-1] == {"failed": 0}

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch", [1, 32])
    @pytest.mark.parametrize("name", hybrid_shapes())
    def test_hybrids(self, name: str, batch: int, dtype: torch.dtype) -> None:
        s, side = hybrid_shapes()[name]
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        assert max(run_mqa(MQACase(s, dtype, "cuda"), batch, side, side)) <= 1

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [(3, 13, 11), (2, 9, 30), (1, 40, 36)])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_odd_maps(self, stride: int, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        s = spec(c=152, heads=5, key_dim=48, value_dim=40, kv_stride=stride)
        assert max(run_mqa(MQACase(s, dtype, "cuda"), *size)) <= 1

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(2, 4, 256, 64, 64, 64), (1, 8, 1024, 1024, 48, 48), (2, 3, 100, 333, 128, 96)])
    @pytest.mark.parametrize("layout", ["contiguous", "heads last", "channels first", "sliced"])
    def test_attention(self, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        q, k, v = attention_inputs(shape, dtype, "cuda", layout)  # type: ignore[arg-type]
        assert max(run_attention(q, k, v, repeats=2)) <= 1

    @pytest.mark.parametrize("name", list(hybrid_shapes())[::3])
    def test_tf32(self, name: str) -> None:
        s, side = hybrid_shapes()[name]
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
                assert max(run_mqa(MQACase(s, torch.float32, "cuda"), 2, side, side, allow_tf32=3)) <= 1
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def test_graph_sees_new_weights(self) -> None:
        from triton_cases import output

        case = MQACase(spec(c=64, kv_stride=2), torch.float16, "cuda")
        block = case.build()
        x = torch.randn(8, 64, 14, 14, device="cuda").half().to(memory_format=torch.channels_last)
        out = output(block, 8, 14, 14, torch.float16, "cuda")
        block.run(x, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            block.run(x, out)
        other = MQACase(case.spec, torch.float16, "cuda", seed=7)
        other.pack(block)
        graph.replay()
        assert max(judge(out, other.reference(x, torch.float16), other.reference(x, torch.float64))) <= 1
