"""Shared fixtures: fixed seeds, outputs poisoned with NaN, one run per CPU tier."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

# before torch: threads that spin for their next region burn most of the time of small tensors where cores are shared
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

from mnv4_ops import _native

SEED = 20250229


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_poison: leave torch.empty and its siblings alone in this test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="waits for an NVIDIA GPU"))


def available_tiers() -> list[str]:
    """CPU tiers that this machine can run, best last; empty without the native library."""
    return list(_native.core.cpu_info()["tiers"]) if _native.core is not None else []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tier" in metafunc.fixturenames:
        tiers: list[Any] = list(available_tiers())
        if not tiers:
            tiers = [pytest.param("none", marks=pytest.mark.skip(reason=f"no native library: {_native.reason}"))]
        metafunc.parametrize("tier", tiers, indirect=True)


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per tier of this host, with the tier in force. Blocks packed before it need repacking."""
    core = _native.core
    assert core is not None
    before = core.cpu_info()["tier"]
    core.set_tier(request.param)
    yield request.param
    core.set_tier(before)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - timm and scikit-image draw from the global state
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _disabled_afterwards() -> Iterator[None]:
    """No test sees what an earlier one enabled."""
    yield
    patch = sys.modules.get("mnv4_ops.patch")
    if patch is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.disable()


def _called_from_package() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("mnv4_ops")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() and not torch.compiler.is_compiling():
        with torch.no_grad():
            tensor.fill_(float("nan"))
    return tensor


@pytest.fixture(autouse=True)
def _poisoned_outputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what mnv4_ops allocates with NaN, so that an element that no kernel writes shows (after fla's conftest)."""
    if request.node.get_closest_marker("no_poison"):
        return

    def patched(original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = original(*args, **kwargs)
            return _poison(tensor) if _called_from_package() else tensor

        return allocate

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, patched(getattr(owner, name)))
