"""The native Mobile MQA block and mqa_attention: values by the 2x rule, the border of the pre-norm, extreme scores."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_helpers import core
from rule import assert_2x
from torch import Tensor

from mnv4_ops import _native, check, ops
from mnv4_ops.reference import functional as R
from mnv4_ops.spec import MQASpec, ledger

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")

HYBRIDS = {
    (entry.spec, entry.height, entry.width): None
    for model, side in itertools.product(("hybrid_medium", "hybrid_large"), (224, 256, 384, 448))
    for entry in ledger(model, side)
    if isinstance(entry.spec, MQASpec)
}
SMALL = MQASpec(32, 2, 16, 16)
ODD = [
    (MQASpec(160, 4, 64, 64, 2, layer_scale=True), 17, 5),
    (MQASpec(192, 8, 48, 48, 2), 1, 9),
    (MQASpec(20, 3, 24, 40, 2, kv_kernel=5), 9, 13),
    (MQASpec(33, 1, 17, 9), 7, 3),
    (MQASpec(33, 2, 17, 9, residual=False), 1, 1),
    (MQASpec(36, 5, 7, 33, 2), 6, 11),
    (MQASpec(40, 2, 16, 24, 2, padding="same"), 8, 10),
    (MQASpec(40, 2, 128, 64, norm=False, residual=False), 9, 4),
    (MQASpec(32, 2, 16, 16), 33, 40),  # more keys than one part of a sum
]
POOLED = [
    (MQASpec(32, 2, 16, 16, 2, 2), 8, 6),
    (MQASpec(32, 2, 16, 24, 1, 2, residual=False), 9, 7),
    (MQASpec(20, 2, 16, 24, 2, 2, padding="same", residual=False), 9, 7),
    (MQASpec(33, 3, 16, 8, 1, 2, layer_scale=True), 2, 2),
    (MQASpec(48, 2, 16, 16, 2, 2), 34, 40),
]


def compare(spec: MQASpec, params: Any, x: Tensor | list[Tensor], what: str = "") -> Tensor:
    """Native against torch by the 2x rule, over all inputs together; 1, 2 and 3 threads give the same bits."""
    native = check.native_block(spec, params)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for one in x if isinstance(x, list) else [x]:
        first = check.native_run(native, spec, one, threads=1)
        for threads in () if found else (2, 3):
            assert torch.equal(check.native_run(native, spec, one, threads=threads), first), (what, threads)
        found.append((first, R.run(one, spec, params), R.run(one.double(), spec, R.cast(params, torch.float64))))
    assert_2x(*(torch.cat(parts) for parts in zip(*found, strict=True)), what)
    return found[0][0]


@pytest.mark.parametrize(("spec", "h", "w"), HYBRIDS)
def test_every_attention_of_the_hybrids(spec: MQASpec, h: int, w: int) -> None:
    case = check.Case("", spec, 1, h, w, True)
    tiers = core().cpu_info()["tiers"]
    with check.forced_tier(), torch.no_grad():
        for result in check.run_case(case, tiers if h <= 16 else tiers[-1:]):
            assert result.ok, result


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("spec", "h", "w"), ODD + POOLED)
def test_odd_sizes_channels_and_pooled_queries(spec: MQASpec, h: int, w: int, batch: int, tier: str) -> None:
    params = check.random_module(spec, 10 + batch).params()
    generator = torch.Generator().manual_seed(10 + batch)
    x = torch.randn(batch, spec.c, h, w, generator=generator)
    wide = torch.randn(batch, spec.c + 3, h, w, generator=generator).to(memory_format=torch.channels_last)[:, 2:-1]
    with torch.no_grad():
        turned = x.transpose(2, 3).contiguous().transpose(2, 3)
        compare(spec, params, [x, -x.to(memory_format=torch.channels_last), turned, wide], tier)


def test_a_layer_scale_of_its_first_value() -> None:
    spec = replace(SMALL, layer_scale=True)
    params = check.random_module(spec).params()._replace(gamma=torch.full((32,), 1e-5))
    with torch.no_grad():
        compare(spec, params, torch.randn(2, 32, 5, 4))


def folded_naively(x: Tensor, spec: MQASpec, params: R.MQAParams) -> Tensor:
    """The pre-norm folded into the depthwise taps and its bias, as if the zeros around the image were shifted too."""
    norm, one = params.norm, torch.ones(1, spec.c, 1, 1, dtype=x.dtype)
    assert norm is not None
    shift = R.batch_norm(torch.zeros_like(one), norm)
    scale = R.batch_norm(one, norm) - shift
    branches = []
    for down, proj in ((params.key_down, params.key), (params.value_down, params.value)):
        assert down is not None
        weight = down.weight * scale.view(-1, 1, 1, 1)
        bias = (down.weight.sum((2, 3)) * shift.view(-1, 1)).flatten()
        y = R.conv2d(x, weight, bias, stride=2, groups=spec.c)
        branches.append(R.pointwise(R.batch_norm(y, down.bn), proj))
    query = R.pointwise(R.batch_norm(x, norm), params.query)
    y = R.pointwise(R.attention(query, *branches, spec.heads), params.output)
    return y + x if spec.residual else y


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 10), (2, 3)])
def test_the_shift_of_the_pre_norm_stops_at_the_border(h: int, w: int, tier: str) -> None:
    spec = MQASpec(32, 2, 16, 16, 2, residual=False)
    params = check.random_module(spec).params()
    params = params._replace(norm=params.norm._replace(bias=torch.full((32,), 1.5)))
    x = torch.randn(2, 32, h, w)
    with torch.no_grad():
        got = compare(spec, params, x, tier)
        exact = R.cast(params, torch.float64)
        truth, naive = R.run(x.double(), spec, exact), folded_naively(x.double(), spec, exact)
        # the rule tells the two apart: a naive fold is off by far more than it allows
        assert (naive - truth).abs().max() > 1000 * (got - truth).abs().max()
        flat = exact._replace(norm=exact.norm._replace(bias=exact.norm.mean * 0))
        flat = flat._replace(norm=flat.norm._replace(mean=flat.norm.mean * 0))
        torch.testing.assert_close(folded_naively(x.double(), spec, flat), R.run(x.double(), spec, flat))


@pytest.mark.parametrize("factor", [30.0, 3000.0])
def test_large_scores(factor: float, tier: str) -> None:
    spec = MQASpec(32, 2, 16, 16, 2)
    params = check.random_module(spec).params()
    params = params._replace(query=params.query._replace(weight=params.query.weight * factor))
    with torch.no_grad():
        out = compare(spec, params, torch.randn(1, 32, 9, 8), tier)
    assert out.isfinite().all()


def test_equal_scores_give_the_mean(tier: str) -> None:
    spec = replace(SMALL, residual=False)
    params = check.random_module(spec).params()
    params = params._replace(query=params.query._replace(weight=params.query.weight * 0))
    with torch.no_grad():
        out = compare(spec, params, torch.randn(1, 32, 7, 6), tier)
    torch.testing.assert_close(out, out.mean((2, 3), keepdim=True).expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", [replace(SMALL, residual=False), MQASpec(32, 2, 16, 24, 2), MQASpec(40, 3, 17, 9, 2)])
def test_what_is_not_finite_goes_through(spec: MQASpec, value: float, tier: str) -> None:
    params = check.random_module(spec).params()
    x = torch.randn(2, spec.c, 6, 7)
    x[0, 3, 2, 4] = value
    with torch.no_grad():
        native = check.native_block(spec, params)
        got, want = check.native_run(native, spec, x), R.run(x, spec, params)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got[1], want[1])


def test_queries_that_cannot_be_pooled() -> None:
    native = check.native_block(POOLED[0][0], check.random_module(POOLED[0][0]).params())
    for call in (
        lambda: native.run(64, 1, 7, 6, (1, 1, 1, 1), 64, 1),
        lambda: native.output_shape(1, 8, 5),
        lambda: core().Program([native]).output_shape(1, 7, 6),
    ):
        with pytest.raises(ValueError, match="divisible by query_stride"):
            call()


def test_bad_arguments() -> None:
    good = {"c": 16, "heads": 2, "key_dim": 8, "value_dim": 8}
    for bad, words in (
        ({"c": 0}, "c = 0"),
        ({"heads": 0}, "heads = 0"),
        ({"key_dim": 0}, "key_dim = 0"),
        ({"value_dim": -1}, "value_dim = -1"),
        ({"kv_kernel": 4}, "kv_kernel = 4, expected 3 or 5"),
        ({"kv_stride": 3}, "kv_stride = 3, expected 1 or 2"),
        ({"query_stride": 0}, "query_stride = 0"),
        ({"query_norm": True}, "query_norm = 1"),
        ({"padding": "valid"}, "expected symmetric or same"),
    ):
        with pytest.raises(ValueError, match=words):
            core().MobileMQA(**(good | bad))
    native = core().MobileMQA(**good)
    weight = torch.zeros(16, 16)
    with pytest.raises(ValueError, match="stage = 3, expected a stage that the block has"):
        native.pack(3, weight.data_ptr())
    with pytest.raises(ValueError, match="norm and query_norm to be packed first"):
        native.pack(2, weight.data_ptr())
    with pytest.raises(ValueError, match="no weight, bias and gamma, for a norm"):
        native.pack(0, weight.data_ptr())
    with pytest.raises(RuntimeError, match="no packed parameters"):
        native.run(64, 1, 4, 4, (1, 1, 1, 1), 64, 1)


def test_a_norm_packed_again_asks_for_the_rest() -> None:
    spec = replace(SMALL, residual=False)
    params = check.random_module(spec).params()
    native = check.native_block(spec, params)
    blob = native.export_blob()
    x = torch.randn(1, 32, 5, 5)
    before = check.native_run(native, spec, x)
    description = check.describe(spec, params)
    check.pack(native, description._replace(stages=description.stages[:1]), check._address)
    with pytest.raises(RuntimeError, match="no packed parameters"):
        check.native_run(native, spec, x)
    native.import_blob(blob)
    assert torch.equal(check.native_run(native, spec, x), before)


def test_between_blocks_of_a_program(tier: str) -> None:
    attention, ffn = MQASpec(40, 2, 16, 24, 2), check.UIBSpec(40, 80, 40, 3, residual=True)
    modules = [check.random_module(spec) for spec in (ffn, attention, ffn, attention)]
    specs = [ffn, attention, ffn, attention]
    natives = [check.native_block(spec, m.params()) for spec, m in zip(specs, modules, strict=True)]
    program = core().Program(natives)
    for batch, h, w in ((1, 9, 8), (5, 12, 13)):
        x = torch.randn(batch, 40, h, w)
        want, plain = x.double(), x
        with torch.no_grad():
            for spec, m in zip(specs, modules, strict=True):
                plain = R.run(plain, spec, m.params())
                want = R.run(want, spec, R.cast(m.params(), torch.float64))
        for threads in (1, 2):
            out = torch.full((batch, h, w, 40), float("nan")).permute(0, 3, 1, 2)
            memory = torch.full((program.workspace_bytes(batch, h, w, threads) // 4,), float("nan"))
            program.run(x.data_ptr(), batch, h, w, x.stride(), out.data_ptr(), memory.data_ptr(), threads)
            assert_2x(out, plain, want)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    return torch.softmax(scores, -1) @ v


def qkv(batch: int, heads: int, nq: int, nk: int, d: int, dv: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, heads, nq, d), torch.randn(batch, 1, nk, d), torch.randn(batch, 1, nk, dv)


@pytest.mark.parametrize(
    ("batch", "heads", "nq", "nk", "d", "dv"),
    [
        (1, 4, 256, 64, 64, 64),
        (2, 8, 576, 144, 48, 48),
        (3, 2, 49, 49, 64, 32),
        (1, 3, 1024, 1024, 16, 128),
        (2, 1, 1, 1, 128, 16),
        (1, 5, 7, 33, 24, 17),
        (1, 2, 5, 300, 9, 130),
    ],
)
def test_attention_alone(batch: int, heads: int, nq: int, nk: int, d: int, dv: int, tier: str) -> None:
    q, k, v = qkv(batch, heads, nq, nk, d, dv)
    for scale in (None, 0.3):
        got = torch.ops.mnv4.mqa_attention(q, k, v, scale)
        plain, want = sdpa(q, k, v, scale), sdpa(q.double(), k.double(), v.double(), scale)
        assert_2x(got, plain, want, tier)
        fused = F.scaled_dot_product_attention(q, *(t.expand(-1, heads, -1, -1) for t in (k, v)), scale=scale)
        torch.testing.assert_close(got, fused)


@pytest.mark.parametrize("value_dim", [24, 32])
def test_attention_takes_any_strides(value_dim: int) -> None:
    q, k, v = qkv(2, 3, 10, 11, 16, value_dim)
    want = torch.ops.mnv4.mqa_attention(q, k, v)
    assert want.transpose(1, 2).is_contiguous()
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert torch.equal(torch.ops.mnv4.mqa_attention(*turned), want)
    padded = [F.pad(t, (1, 2))[..., 1:-2] for t in (q, k, v)]
    assert torch.equal(torch.ops.mnv4.mqa_attention(*padded), want)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(torch.ops.mnv4.mqa_attention(q, k, v), want)
    finally:
        torch.set_num_threads(threads)


def test_attention_of_nothing() -> None:
    assert torch.ops.mnv4.mqa_attention(*qkv(0, 2, 5, 6, 16, 24)).shape == (0, 2, 5, 24)
    assert torch.ops.mnv4.mqa_attention(*qkv(2, 2, 0, 6, 16, 24)).shape == (2, 2, 0, 24)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_attention_of_what_is_not_finite(where: str, value: float, tier: str) -> None:
    q, k, v = qkv(1, 2, 9, 21, 16, 16)
    {"q": q, "k": k, "v": v}[where][0, 0, 4, 3] = value
    got, want = torch.ops.mnv4.mqa_attention(q, k, v), sdpa(q, k, v)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isposinf(), want.isposinf())
    torch.testing.assert_close(got, want, equal_nan=True)


def test_attention_far_apart_and_equal(tier: str) -> None:
    q, k, v = qkv(1, 2, 33, 50, 16, 16)
    for factor in (0.0, 1e4):
        got = torch.ops.mnv4.mqa_attention(q * factor, k, v)
        assert_2x(got, sdpa(q * factor, k, v), sdpa(q.double() * factor, k.double(), v.double()), tier)


def test_attention_is_an_op() -> None:
    overload = torch.ops.mnv4.mqa_attention.default
    torch.library.opcheck(overload, qkv(2, 3, 5, 6, 16, 24))
    q, k, v = qkv(1, 2, 5, 6, 16, 24)
    q.requires_grad_()
    torch.library.opcheck(
        overload, (q, k, v), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    with pytest.raises(RuntimeError, match="inference only"):
        overload(q, k, v).sum().backward()
    assert ops.attention.OP not in ops.SCHEMAS


def test_attention_refuses_in_words() -> None:
    op = torch.ops.mnv4.mqa_attention
    q, k, v = qkv(1, 2, 5, 6, 16, 24)
    for call, words in (
        (lambda: op(q, k, v, attn_mask=torch.zeros(5, 6)), "expected no attn_mask"),
        (lambda: op(q, k, v, dropout_p=0.1), "expected dropout_p 0, got 0.1"),
        (lambda: op(q, k, v, is_causal=True), "expected is_causal False"),
        (lambda: op(q[0], k, v), "q with 4 dimensions"),
        (lambda: op(q.double(), k, v), "q of dtype float32"),
        (lambda: op(q, k.half(), v), "k of dtype float32"),
        (lambda: op(q, k.expand(-1, 2, -1, -1), v), r"k of shape \[1, 1, Nk, 16\]"),
        (lambda: op(q, k, v[:, :, 1:]), r"v of shape \[1, 1, 6, dv\]"),
        (lambda: op(q, k[:, :, :0], v[:, :, :0]), "at least one key"),
    ):
        with pytest.raises(ValueError, match=f"mnv4::mqa_attention: expected.*{words.removeprefix('expected ')}"):
            call()
