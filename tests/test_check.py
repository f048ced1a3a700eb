"""The suite behind `mnv4-ops check`: its cases, its judgement, and the kernels on small odd images."""

from __future__ import annotations

import pytest
import torch

from mnv4_ops import _native, check
from mnv4_ops.reference import functional as R
from mnv4_ops.spec import ConvSpec, HeadSpec, PoolSpec, UIBSpec, ledger

needs_native = pytest.mark.skipif(_native.core is None, reason=f"no native library: {_native.reason}")


def test_every_native_spec_of_the_ledger_is_a_case() -> None:
    covered = {case.spec for case in check.cases(quick=True)}
    for entry in ledger():
        if entry.spec.kind not in ("AvgPool", "Linear"):
            assert entry.spec in covered, entry
    assert covered == {case.spec for case in check.cases()}
    assert any(isinstance(spec, HeadSpec) for spec in covered)


def test_cases_include_odd_sizes_and_both_layouts() -> None:
    cases = check.cases()
    assert any(case.height != case.width and case.height % 2 for case in cases)
    assert {case.channels_last for case in cases} == {True, False}


def _case() -> check.Case:
    return check.Case("test", ConvSpec(4, 40), 2, 9, 7, False)


def _result(change: float) -> check.Result:
    truth = torch.linspace(-1, 1, 5040, dtype=torch.float64).view(2, 40, 9, 7)
    plain = truth.float()
    output = plain.clone()
    output[0, 0, 0, 0] += change
    return check._judge(_case(), "scalar", output, plain, truth)


@pytest.mark.parametrize(("change", "ok"), [(0.0, True), (1e-3, False), (float("nan"), False), (float("inf"), False)])
def test_the_rule_catches_one_wrong_element(change: float, ok: bool) -> None:
    assert _result(change).ok is ok


def test_worst_prefers_failures_and_nan() -> None:
    good, bad, nan = _result(0.0), _result(1e-3), _result(float("nan"))
    assert check.worst([good, bad]) == [bad]
    assert check.worst([bad, good]) == [bad]
    assert check.worst([good, nan]) == [nan]


@pytest.mark.parametrize(
    "spec", [ConvSpec(3, 8, 3, 2), UIBSpec(8, 16, 8, 3, 5, residual=True, layer_scale=True)], ids=str
)
def test_random_modules_compute_what_their_params_say(spec: ConvSpec | UIBSpec) -> None:
    module = check.random_module(spec, seed=3)
    x = torch.randn(2, spec.c_in, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(R.run(x, spec, module.params()), module(x))


@pytest.mark.parametrize("widths", [(16, 24, 40, 10), (16, 0, 40, 10), (16, 24, 0, 10), (16, 24, 40, 0), (16, 0, 0, 0)])
def test_random_heads_with_stages_left_out(widths: tuple[int, int, int, int]) -> None:
    spec = HeadSpec(*widths)
    module = check.random_module(spec)
    x = torch.randn(2, 16, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(R.run(x, spec, module.params()), module(x))


@needs_native
def test_a_pool_has_no_native_block() -> None:
    with pytest.raises(TypeError, match="PoolSpec"):
        check.native_block(PoolSpec(16), None)


def _one_of_each_kind() -> list[check.Case]:
    found: dict[str, check.Case] = {}
    for case in check.cases(quick=True):
        # the small models have the small specs of each kind
        found.setdefault(case.spec.kind, case)
    return list(found.values())


@needs_native
@pytest.mark.parametrize("case", _one_of_each_kind(), ids=lambda case: case.spec.kind)
def test_one_of_each_kind(case: check.Case, tier: str) -> None:
    (result,) = check.run_case(case, [tier])
    assert result.ok, result


@needs_native
def test_the_tier_in_force_is_restored() -> None:
    assert _native.core is not None
    before = _native.core.cpu_info()["tier"]
    with check.forced_tier():
        _native.core.set_tier(_native.core.cpu_info()["tiers"][0])
    assert _native.core.cpu_info()["tier"] == before
