"""Every block of every model on every tier by the 2x rule, and the scratch that it needs [13, 18]."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_helpers import assert_2x, model_program, reference_chain, run

from mnv4_ops import _native, check
from mnv4_ops.reference import functional as R
from mnv4_ops.spec import MODELS, HeadSpec, MQASpec, Spec, UIBSpec

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

CONV_MODELS = [name for name in MODELS if "conv" in name]
SMALL = check.cases(quick=True)
# row of the ledger -> case at its own resolution, batch 1
FULL = [case for case in check.cases() if case.batch == 1]


def _id(case: check.Case) -> str:
    return f"{case.where.replace(' ', '-')}-{case.spec.kind}-{case.height}x{case.width}"


def _core() -> Any:
    assert _native.core is not None
    return _native.core


def _judge(spec: Spec, height: int, width: int, seed: int, channels_last: bool) -> None:
    """By the 2x rule, over an odd, an even and a small image at once: a maximum over few elements is luck."""
    params = check.random_module(spec, seed).params()
    exact, native = R.cast(params, torch.float64), check.native_block(spec, params)
    found: list[list[torch.Tensor]] = [[], [], []]
    generator = torch.Generator().manual_seed(seed)
    for batch, h, w in ((2, height, width), (2, height + 1, width + 1), (3, 5, 8)):
        x = torch.randn(batch, spec.channels[0], h, w, generator=generator)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        with torch.no_grad():
            outputs = run(native, x), R.run(x, spec, params), R.run(x.double(), spec, exact)
        for images, output in zip(found, outputs, strict=True):
            images.append(output.flatten())
    assert_2x(*map(torch.cat, found))


@pytest.mark.parametrize("case", SMALL, ids=_id)
def test_every_spec(case: check.Case, tier: str) -> None:
    _judge(case.spec, case.height, case.width, 0, case.channels_last)


@pytest.mark.parametrize("case", [c for c in SMALL if not isinstance(c.spec, HeadSpec)], ids=_id)
def test_every_spec_with_same_padding(case: check.Case, tier: str) -> None:
    """An even side is where TF SAME and symmetric differ at stride 2."""
    _judge(replace(case.spec, padding="same"), case.height, case.width, 3, not case.channels_last)


@pytest.mark.parametrize("case", FULL[::5] + [c for c in FULL if c.where.endswith("stem")], ids=_id)
def test_some_specs_at_full_size(case: check.Case, tier: str) -> None:
    (result,) = check.run_case(case, [tier], seed=5)
    assert result.ok, result


@pytest.mark.parametrize("size", [1e-5, 1.0])
@pytest.mark.parametrize("case", [c for c in SMALL if isinstance(c.spec, UIBSpec) and c.spec.residual][::3], ids=_id)
def test_layer_scale(case: check.Case, tier: str, size: float) -> None:
    """At gamma 1e-5 the branch is judged without the residual, under which it would vanish."""
    for residual in (True, False):
        spec = replace(case.spec, layer_scale=True, residual=residual)
        params = check.random_module(spec, 1).params()
        params = params._replace(gamma=torch.rand(spec.channels[1]).mul(0.8).add(0.2) * size)
        x = torch.randn(2, spec.channels[0], 7, 6)
        with torch.no_grad():
            plain, truth = R.run(x, spec, params), R.run(x.double(), spec, R.cast(params, torch.float64))
            output = check.native_run(check.native_block(spec, params), spec, x, threads=1)
        assert_2x(output, plain, truth)


@pytest.mark.parametrize("model", CONV_MODELS)
def test_whole_models_as_one_program(model: str, tier: str) -> None:
    """Blocks hand over blocked tensors; the stem and the block after it may run in bands."""
    program, parts = model_program(model)
    for shape in ((1, 3, 224, 224), (2, 3, 97, 65)):
        x = torch.randn(shape)
        plain, truth = reference_chain(parts, x), reference_chain(parts, x.double())
        for layout in (torch.contiguous_format, torch.channels_last):
            assert_2x(run(program, x.contiguous(memory_format=layout)), plain, truth)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_scratch_fits_in_l2_and_does_not_grow(threads: int) -> None:
    """Per thread, at the standard resolution. `scratch_bytes` takes no batch: the same scratch serves any.

    A quarter more than L2 where bands would be thinner than 64 pixels.
    """
    l2 = _core().cpu_info()["l2"]
    for case in FULL:
        native = check.native_block(case.spec, check.random_module(case.spec).params())
        h, w = case.height, case.width
        # keys and values of a whole image have to be kept
        heights = (1,) if isinstance(case.spec, MQASpec) else (1, 2, 8, 64)
        sizes = [native.scratch_bytes(h * times, w, threads) for times in heights]
        assert max(sizes) <= l2 * 5 / 4, (case, sizes)
        with pytest.raises(TypeError):
            native.scratch_bytes(1, h, w, threads)


@pytest.mark.parametrize("model", CONV_MODELS)
def test_scratch_and_workspace_of_programs(model: str) -> None:
    program, _ = model_program(model)
    l2 = _core().cpu_info()["l2"]
    for threads in (1, 2, 4):
        assert max(program.scratch_bytes(224 * times, 224, threads) for times in (1, 2, 8)) <= l2 * 5 / 4
    one = program.workspace_bytes(1, 224, 224, 1)
    for batch, times in ((2, 1), (8, 1), (1, 2), (1, 8), (4, 4)):
        assert program.workspace_bytes(batch, 224 * times, 224, 2) <= batch * times * one * 1.01
    # less than the activations of one block's input and output at the largest place
    assert one <= 4 * 2 * 112 * 112 * 128
    assert program.workspace_bytes(0, 224, 224, 1) == 0
