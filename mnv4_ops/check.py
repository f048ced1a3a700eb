"""The kernel correctness suite behind `mnv4-ops check`: every spec of the ledger on every tier against float64.

A result passes by the 2x rule: with the error e against torch's own operations in float64 on the unfolded parameters,
and e_torch the error of plain torch in the same dtype, max|e| <= 2 max|e_torch| + 2 ulp(max|ref|), and from 1024
elements up rms(e) <= 2 rms(e_torch). The native objects are called directly, on NaN-poisoned outputs, so that nothing
can fall back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from mnv4_ops import _native
from mnv4_ops.reference import functional as R
from mnv4_ops.reference import modules, randomize_
from mnv4_ops.spec import MODELS, ConvSpec, FusedIBSpec, HeadSpec, MQASpec, Spec, UIBSpec, head_spec, ledger

_RMS_FROM = 1024
_QUICK_SIDE = 13
Native = Any


@dataclass(frozen=True)
class Case:
    """One spec at one input size. `where` names the first ledger row that has it."""

    where: str
    spec: Spec
    batch: int
    height: int
    width: int
    channels_last: bool


@dataclass(frozen=True)
class Result:
    """`error` and `rms` as fractions of what the 2x rule allows (above 1 fails); `max_error` absolute, `scale` is
    max|ref|.
    """

    case: Case
    tier: str
    error: float
    rms: float
    max_error: float
    scale: float

    @property
    def ok(self) -> bool:
        # written so that NaN fails
        return self.error <= 1 and self.rms <= 1

    def as_dict(self) -> dict[str, Any]:
        case = self.case
        return {
            "where": case.where,
            "kind": case.spec.kind,
            "spec": asdict(case.spec),
            "input": [case.batch, case.spec.channels[0], case.height, case.width],
            "channels_last": case.channels_last,
            "tier": self.tier,
            "dtype": case.spec.dtype,
            "of_allowed_max": self.error,
            "of_allowed_rms": self.rms,
            "max_error": self.max_error,
            "scale": self.scale,
            "ok": self.ok,
        }


def cases(*, quick: bool = False) -> list[Case]:
    """Every distinct native spec of the five models, the heads as one unit.

    Full: at its own resolution and batch 1, and at an odd, non-square size and batch 2. Quick: the odd size only, at
    most 13 pixels.
    """
    found: dict[tuple[Spec, int, int], str] = {}
    for entry in ledger():
        if isinstance(entry.spec, (ConvSpec, FusedIBSpec, MQASpec, UIBSpec)):
            found.setdefault((entry.spec, entry.height, entry.width), f"{entry.model} {entry.name}")
    for model in MODELS:
        last = next(e for e in ledger(model) if e.name == "4.0")
        found.setdefault((head_spec(model), last.height, last.width), f"{model} head")
    result = []
    odd: set[Spec] = set()
    for index, ((spec, h, w), where) in enumerate(found.items()):
        if not quick:
            result.append(Case(where, spec, 1, h, w, bool(index % 2)))
        if spec not in odd:
            odd.add(spec)
            side = min(h, _QUICK_SIDE) if quick else h
            result.append(Case(where, spec, 2, max(side - 1 + side % 2, 1), max(side - 2, 1), not index % 2))
    return result


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Description(NamedTuple):
    """What a native block is made from: its class and keywords, and its stages with their parameters."""

    cls: str
    keywords: dict[str, Any]
    stages: list[tuple[int, R.ConvBN, torch.Tensor | None]]  # native stage, layer, layer scale


def describe(spec: Spec, params: Any) -> Description:
    """A spec and its parameters (reference.functional's tuples) for `_core` and for the kernels of a GPU."""
    if isinstance(spec, UIBSpec):
        keywords = {
            "c_in": spec.c_in, "c_mid": spec.c_mid, "c_out": spec.c_out, "padding": spec.padding,
            "residual": spec.residual,
            "start_kernel": spec.start_kernel, "start_stride": spec.start_stride,
            "expand": True, "expand_act": spec.act,
            "mid_kernel": spec.mid_kernel, "mid_stride": spec.mid_stride,
            "mid_act": spec.act if spec.mid_kernel else "none",
            "project": True,
        }  # fmt: skip
        layers = [(0, params.start), (1, params.expand), (2, params.mid), (3, params.project)]
        stages = [(i, layer, params.gamma if i == 3 else None) for i, layer in layers if layer is not None]
        return Description("Block", keywords, stages)
    if isinstance(spec, FusedIBSpec):
        keywords = {
            "c_in": spec.c_in, "c_mid": spec.c_mid, "c_out": spec.c_out, "padding": spec.padding,
            "residual": spec.residual,
            "expand": True, "expand_kernel": spec.kernel, "expand_stride": spec.stride, "expand_act": spec.act,
            "project": True,
        }  # fmt: skip
        return Description("Block", keywords, [(1, params.expand, None), (3, params.project, None)])
    if isinstance(spec, ConvSpec):
        keywords = {"c_in": spec.c_in, "c_mid": spec.c_out, "c_out": spec.c_out, "padding": spec.padding}
        if spec.depthwise:
            keywords |= {"start_kernel": spec.kernel, "start_stride": spec.stride, "start_act": spec.act}
        else:
            keywords |= {"expand_kernel": spec.kernel, "expand_stride": spec.stride, "expand_act": spec.act}
            keywords["expand"] = True
        return Description("Block", keywords, [(0 if spec.depthwise else 1, params, None)])
    if isinstance(spec, HeadSpec):
        keywords = {
            "c_in": spec.c_in, "c_feat": spec.c_feat, "feat_act": spec.act, "c_hidden": spec.c_hidden,
            "hidden_act": spec.act,
            "classes": spec.classes,
        }  # fmt: skip
        layers = [(0, params.feat), (1, params.hidden), (2, params.classifier)]
        return Description("Head", keywords, [(i, layer, None) for i, layer in layers if layer is not None])
    if isinstance(spec, MQASpec):
        keywords = {
            "c": spec.c, "heads": spec.heads, "key_dim": spec.key_dim, "value_dim": spec.value_dim,
            "kv_kernel": spec.kv_kernel, "kv_stride": spec.kv_stride, "query_stride": spec.query_stride,
            "norm": params.norm is not None, "query_norm": params.query_norm is not None,
            "padding": spec.padding, "residual": spec.residual,
        }  # fmt: skip
        bare = [None if bn is None else R.ConvBN(None, bn) for bn in (params.norm, params.query_norm)]
        p = params
        branches = [*bare, p.query, p.key_down, p.key, p.value_down, p.value, p.output]
        stages = [(i, layer, p.gamma if i == 7 else None) for i, layer in enumerate(branches) if layer is not None]
        return Description("MobileMQA", keywords, stages)
    raise TypeError(
        f"native_block: expected a UIBSpec, FusedIBSpec, ConvSpec, MQASpec or HeadSpec, got {type(spec).__name__}"
    )


def pack(native: Native, description: Description, give: Callable[[torch.Tensor | None], Any]) -> Native:
    """Packs all stages; `give` turns a tensor (or None) into what the native object takes."""
    for stage, layer, gamma in description.stages:
        bn = layer.bn
        norm = (
            {}
            if bn is None
            else {
                "bn_weight": give(bn.weight),
                "bn_bias": give(bn.bias),
                "bn_mean": give(bn.mean),
                "bn_var": give(bn.var),
                "eps": bn.eps,
            }
        )
        native.pack(stage, give(layer.weight), bias=give(layer.bias), gamma=give(gamma), **norm)
    return native


def native_block(spec: Spec, params: Any) -> Native:
    """`_core.Block`, `_core.MobileMQA` or `_core.Head` of a spec, packed from float32 parameters
    (reference.functional's tuples), for the tier in force.
    """
    core = _native.core
    assert core is not None
    description = describe(spec, params)
    return pack(getattr(core, description.cls)(**description.keywords), description, _address)


def native_run(native: Native, spec: Spec, x: torch.Tensor, *, threads: int | None = None) -> torch.Tensor:
    """Output of a native block or head on float32 [N, C, H, W] of any strides: channels_last, or [N, features] of a
    head.
    """
    n, _, h, w = x.shape
    if isinstance(spec, HeadSpec):
        out = torch.full((n, spec.features), float("nan"))
    else:
        ho, wo = spec.out_hw(h, w)
        out = torch.full((n, ho, wo, spec.channels[1]), float("nan")).permute(0, 3, 1, 2)
    native.run(x.data_ptr(), n, h, w, tuple(x.stride()), out.data_ptr(), threads or torch.get_num_threads())
    return out


class _HeadModule(torch.nn.Sequential):
    """A head as plain modules: [1x1 + BN + act], pool, [1x1 + BN + act], flatten, [linear]."""

    def __init__(self, spec: HeadSpec) -> None:
        feat = modules.ConvBNAct(ConvSpec(spec.c_in, spec.c_feat, 1, 1, spec.act)) if spec.c_feat else None
        wide = spec.c_feat or spec.c_in
        hidden = modules.ConvBNAct(ConvSpec(wide, spec.c_hidden, 1, 1, spec.act)) if spec.c_hidden else None
        linear = torch.nn.Linear(spec.c_hidden or wide, spec.classes) if spec.classes else None
        stages = (feat, torch.nn.AdaptiveAvgPool2d(1), hidden, torch.nn.Flatten(), linear)
        super().__init__(*(stage or torch.nn.Identity() for stage in stages))

    def params(self) -> R.HeadParams:
        feat, _, hidden, _, linear = self
        classifier = R.ConvBN(linear.weight, None, linear.bias) if isinstance(linear, torch.nn.Linear) else None
        convs = [layer.params() if isinstance(layer, modules.ConvBNAct) else None for layer in (feat, hidden)]
        return R.HeadParams(convs[0], convs[1], classifier)


def random_module(spec: Spec, seed: int = 0) -> Any:
    """A plain module of a spec in eval mode, every weight, BN and layer scale drawn at random; `.params()` gives its
    tensors.
    """
    module = _HeadModule(spec) if isinstance(spec, HeadSpec) else modules.build_block(spec)
    return randomize_(module.eval(), seed)


def of_allowed(output: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Largest and rms error of an output as fractions of what the 2x rule allows; above 1 fails.

    `plain` is torch's output in the dtype of the output, `truth` that in float64. The rms is 0 below 1024 elements.
    """
    error, error_torch = (output.double() - truth).abs(), (plain.double() - truth).abs()
    scale = float(truth.abs().max())
    ulp = torch.finfo(output.dtype).eps * 2.0 ** math.floor(math.log2(scale)) if 0 < scale < math.inf else 1e-45
    allowed = 2 * float(error_torch.max()) + 2 * ulp
    rms = 0.0
    if truth.numel() >= _RMS_FROM:
        # a tiny floor only where torch happens to be exact
        rms = float(error.square().mean().sqrt()) / max(2 * float(error_torch.square().mean().sqrt()), ulp * 1e-3)
    return float(error.max()) / allowed, rms


def _judge(case: Case, tier: str, output: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> Result:
    error, rms = of_allowed(output, plain, truth)
    return Result(case, tier, error, rms, float((output.double() - truth).abs().max()), float(truth.abs().max()))


@torch.no_grad()
def run_case(case: Case, tiers: list[str], seed: int = 0) -> list[Result]:
    """One result per tier; the tier in force afterwards is the last one (`forced_tier` restores)."""
    core = _native.core
    assert core is not None
    params = random_module(case.spec, seed).params()
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(case.batch, case.spec.channels[0], case.height, case.width, generator=generator)
    if case.channels_last:
        x = x.to(memory_format=torch.channels_last)
    truth = R.run(x.double(), case.spec, R.cast(params, torch.float64))
    plain = R.run(x, case.spec, params)
    results = []
    for tier in tiers:
        core.set_tier(tier)
        output = native_run(native_block(case.spec, params), case.spec, x)
        results.append(_judge(case, tier, output, plain, truth))
    return results


@contextmanager
def forced_tier() -> Iterator[None]:
    """Puts back the tier that was in force before."""
    core = _native.core
    assert core is not None
    before = core.cpu_info()["tier"]
    try:
        yield
    finally:
        core.set_tier(before)


def run(
    tiers: list[str], *, quick: bool = False, on_case: Callable[[Case, int, int], None] | None = None
) -> list[Result]:
    """All cases on all `tiers` (names of `_core.cpu_info()["tiers"]`). `on_case(case, index, total)` is called before
    each.
    """
    todo = cases(quick=quick)
    results: list[Result] = []
    with forced_tier():
        for index, case in enumerate(todo):
            if on_case is not None:
                on_case(case, index, len(todo))
            results += run_case(case, tiers, seed=index)
    return results


def worst(results: list[Result]) -> list[Result]:
    """The worst result of each kind and tier, in the order of first appearance."""
    found: dict[tuple[str, str], Result] = {}
    for result in results:
        key = (result.case.spec.kind, result.tier)
        before = found.get(key)
        # `not <=` so that NaN counts as worst
        if before is None or not max(result.error, result.rms) <= max(before.error, before.rms):
            found[key] = result
    return list(found.values())
