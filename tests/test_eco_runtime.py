"""Autocast, threads, fork, memory and wrapped modules beside enable()."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import mnv4_ops
from mnv4_ops import _native, cache, patch
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
B = pytest.importorskip("timm.models._efficientnet_blocks")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
SMALL = "mobilenetv4_conv_small_035"
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _off_afterwards() -> Iterator[None]:
    yield
    patch.disable()


def model(**options: Any) -> Any:
    return randomize_(timm.create_model(SMALL, **({"num_classes": 4} | options))).eval()


def block(**options: Any) -> Any:
    return randomize_(B.UniversalInvertedResidual(16, 16, dw_kernel_size_start=3, **options)).eval()


def test_autocast_gives_values_and_dtype_of_the_original() -> None:
    x = torch.randn(2, 16, 7, 6)
    for m, given in ((model(), X), (block(), x), (block(layer_scale_init_value=0.5), x)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            want = m(given)
            with mnv4_ops.enable():
                got = m(given)
                report = mnv4_ops.explain(m, given)
        assert not report.served
        assert "autocast is enabled" in [row.by for row in report.fallbacks]
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_eight_threads_over_one_model_and_over_several() -> None:
    one = model()
    several = [randomize_(model(), seed=seed).eval() for seed in range(8)]
    mnv4_ops.enable()
    with torch.no_grad():
        want, wants = one(X), [m(X) for m in several]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(4):
                    assert torch.equal(one(X), want)
                    assert torch.equal(several[i](X), wants[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not any(t.is_alive() for t in threads)
    assert not errors, errors[0]


PROCESSES = """
import multiprocessing, sys, timm, torch, mnv4_ops
from torch.utils.data import DataLoader, Dataset

class Features(Dataset):  # what an enabled model gives, in the workers of a DataLoader
    def __init__(self, m):
        self.m = m

    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = torch.full((1, 3, 64, 64), float(i))
        with torch.no_grad():
            assert not mnv4_ops.explain(self.m, x).fallbacks
            return self.m(x)[0]

def start_worker(i):
    mnv4_ops.enable()

def child(m, x, queue):
    mnv4_ops.enable()
    with torch.no_grad():
        assert not mnv4_ops.explain(m, x).fallbacks
        queue.put(m(x).tolist())

if __name__ == "__main__":
    mnv4_ops.enable()
    m = timm.create_model("mobilenetv4_conv_small_035", num_classes=4).eval()
    x = torch.ones(2, 3, 64, 64)
    with torch.no_grad():
        want = m(x)  # OpenMP has its threads before the fork
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    p = context.Process(target=child, args=(m, x, queue))
    p.start()
    got = torch.tensor(queue.get(timeout=100))
    p.join(60)
    assert p.exitcode == 0, p.exitcode
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    fork = sys.argv[1] == "fork"  # spawned workers take seconds to import torch
    workers = {"num_workers": 2 if fork else 1, "multiprocessing_context": context, "worker_init_fn": start_worker}
    loader = DataLoader(Features(m), 2, **workers)
    for _ in range(2 if fork else 1):
        got = torch.cat(list(loader))
        torch.testing.assert_close(got, torch.stack([Features(m)[i] for i in range(4)]), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            m.classifier.weight.mul_(2)  # for the next workers
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_an_enabled_model_in_another_process(start: str, tmp_path: Any) -> None:
    (tmp_path / "run.py").write_text(PROCESSES)
    done = subprocess.run([sys.executable, "run.py", start], cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="waits for a free-threaded Python")
def test_a_free_threaded_python_keeps_its_lock(tmp_path: Any) -> None:
    """The native module does not say that it works without: Python turns the lock on and says so."""
    code = "import sys, mnv4_ops; assert sys._is_gil_enabled()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "GIL" in done.stderr


def many() -> Any:
    return block(), [torch.randn(n, 16, h, w) for n in (1, 2) for h in range(1, 12) for w in range(1, 12)]


def many_whole() -> Any:
    """More shapes than are remembered, so that what is kept for a shape is made and dropped all the time."""
    return model(), [torch.randn(n, 3, h, w) for n in (1, 2) for h in range(32, 68, 4) for w in range(32, 68, 4)]


@pytest.mark.parametrize("make", [many, many_whole])
def test_ten_thousand_forwards_of_changing_shapes_keep_nothing(make: Any) -> None:
    resource = pytest.importorskip("resource")
    m, shapes = make()
    mnv4_ops.enable()
    with torch.no_grad():
        for x in shapes * 2:
            m(x)
        gc.collect()
        before, kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, cache.stats()
        for i in range(10_000):
            m(shapes[i % len(shapes)])
        gc.collect()
    assert cache.stats() == kept
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB


def lora(m: Any) -> None:
    class LoRA(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            return self.inner(x) * 1.5

    m.pw_exp.conv = LoRA(m.pw_exp.conv)


def weight_norm(m: Any) -> None:
    nn.utils.parametrizations.weight_norm(m.pw_exp.conv)


def old_weight_norm(m: Any) -> None:
    nn.utils.weight_norm(m.pw_exp.conv)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [lora, weight_norm, old_weight_norm], ids=lambda f: f.__name__)
def test_wrapped_modules_are_left_alone_with_the_reason(wrap: Any) -> None:
    m, x = block(), torch.randn(2, 16, 7, 6)
    wrap(m)
    with torch.no_grad():
        want = m(x)
        mnv4_ops.enable()
        report = mnv4_ops.explain(m, x)
        assert torch.equal(m(x), want)
    assert [row.served for row in report.rows] == [False]
    assert "pw_exp" in report.rows[0].by


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm])
def test_synchronised_norms_are_left_alone_with_the_reason(convert: Any) -> None:
    m = convert(block()).eval()
    x = torch.randn(2, 16, 7, 6)
    with torch.no_grad():
        want = m(x)
        mnv4_ops.enable()
        report = mnv4_ops.explain(m, x)
        assert torch.equal(m(x), want)
    assert [row.served for row in report.rows] == [False]
    assert "Sync" in report.rows[0].by


def test_a_pickled_model_is_served_again() -> None:
    m = model()
    mnv4_ops.enable()
    with torch.no_grad():
        want = m(X)
        assert torch.equal(pickle.loads(pickle.dumps(m))(X), want)


def test_timm_features() -> None:
    plain, pooled = model(num_classes=0), model(in_chans=1)
    hidden = model()
    with torch.no_grad():
        features = hidden.forward_intermediates(X)
        wants = [plain(X), pooled(X[:, :1]), hidden.forward_head(hidden.forward_features(X)), features[0]]
        mnv4_ops.enable()
        gots = [plain(X), pooled(X[:, :1]), hidden.forward_head(hidden.forward_features(X))]
        final, intermediates = hidden.forward_intermediates(X)
        for got, want in zip([*gots, final, *intermediates], [*wants[:3], features[0], *features[1]], strict=True):
            pairs = zip(got, want, strict=True) if isinstance(want, list) else [(got, want)]
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        hidden.reset_classifier(7)
        assert hidden(X).shape == (2, 7)
        assert not mnv4_ops.explain(hidden, X).fallbacks
