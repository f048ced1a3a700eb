"""The suite of `check` on a GPU: every spec of the ledger in float16, bfloat16 and float32 against float64.

All of it runs on the device, torch's own operations in IEEE precision. The kernels are called directly, on NaN-poisoned
outputs, so that nothing can fall back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mnv4_ops import check
from mnv4_ops.check import Case, Result
from mnv4_ops.ops import cuda
from mnv4_ops.reference import functional as R
from mnv4_ops.spec import HeadSpec, Spec

DTYPES = ("float16", "bfloat16", "float32")


@contextmanager
def ieee() -> Iterator[None]:
    """No TF32 inside, in convolutions and matrix products of float32."""
    settings: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def gpu_block(spec: Spec, params: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The Triton block or head of a spec, packed from parameters (reference.functional's tuples) on the device."""
    module = cuda.kernels()
    description = check.describe(spec, params)
    native = getattr(module, description.cls)(dtype=dtype, device=device, **description.keywords)
    return check.pack(native, description, lambda t: t)


def gpu_run(native: Any, spec: Spec, x: torch.Tensor, *, allow_tf32: bool = False) -> torch.Tensor:
    """Output on [N, C, H, W] of any strides: channels_last, or [N, features] of a head."""
    n, _, h, w = x.shape
    if isinstance(spec, HeadSpec):
        out = torch.full((n, spec.features), float("nan"), dtype=x.dtype, device=x.device)
    else:
        ho, wo = spec.out_hw(h, w)
        shape = (n, ho, wo, spec.channels[1])
        out = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    native.run(x, out, allow_tf32=allow_tf32)
    return out


@torch.no_grad()
def run_case(case: Case, dtypes: Sequence[str], device: torch.device, seed: int = 0) -> list[Result]:
    """One result per dtype."""
    module = check.random_module(case.spec, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    image = torch.randn(case.batch, case.spec.channels[0], case.height, case.width, generator=generator)
    results = []
    with ieee():
        for name in dtypes:
            dtype = getattr(torch, name)
            params, x = R.cast(module.params(), dtype, device), image.to(device, dtype)
            if case.channels_last:
                x = x.to(memory_format=torch.channels_last)
            truth = R.run(x.double(), case.spec, R.cast(params, torch.float64))
            plain = R.run(x, case.spec, params)
            output = gpu_run(gpu_block(case.spec, params, dtype, device), case.spec, x)
            rounded = replace(case, spec=case.spec.with_dtype(name))
            results.append(check._judge(rounded, device.type, output, plain, truth))
    return results


def run(
    dtypes: Sequence[str],
    *,
    quick: bool = False,
    device: torch.device | None = None,
    on_case: Callable[[Case, int, int], None] | None = None,
) -> list[Result]:
    """All cases of `check.cases` in all `dtypes`. `on_case(case, index, total)` is called before each."""
    todo = check.cases(quick=quick)
    where = device or torch.device("cuda", torch.cuda.current_device())
    results: list[Result] = []
    for index, case in enumerate(todo):
        if on_case is not None:
            on_case(case, index, len(todo))
        results += run_case(case, dtypes, where, seed=index)
    return results
