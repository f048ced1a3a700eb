"""What of the GPU's bench, suite and tables needs no GPU: clock, judgement, reports, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from typer.testing import CliRunner

from mnv4_ops import _native, check, check_gpu, tuning
from mnv4_ops.bench import gpu, gpu_clock, gpu_report, gpu_run
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.cli import app
from mnv4_ops.ops import cuda
from mnv4_ops.spec import ConvSpec, HeadSpec, UIBSpec

needs_native = pytest.mark.skipif(_native.core is None, reason="no native library")


def test_interleaved_spans() -> None:
    counts: dict[str, list[int]] = {"a": [], "b": []}

    def span(run: Any, count: int) -> float:
        counts[run()].append(count)
        return 1e-4 if run() == "a" else 1.0

    rounds: list[Any] = []
    stats = gpu_clock.interleave(
        {name: (lambda name=name: name) for name in counts},
        rounds=3,
        span=span,
        on_round=lambda done, total: rounds.append((done, total)),
    )
    # two to find the length of a span, then in each round a warm-up and five spans
    assert counts["a"] == [2, 2] + [1, 20, 20, 20, 20, 20] * 3
    assert counts["b"] == [2, 2] + [1] * 18
    assert stats["a"].median_ms == pytest.approx(0.1)
    assert stats["b"].calls == 15
    assert rounds == [(1, 3), (2, 3), (3, 3)]


def test_judgement() -> None:
    truth = torch.linspace(-4, 4, 2048, dtype=torch.float64).view(2, 1024)
    plain = truth.half()
    assert gpu.judge(plain, plain, truth)["ok"]
    assert not gpu.judge(plain + 0.1, plain, truth)["ok"]
    assert not gpu.judge(plain * float("nan"), plain, truth)["ok"]
    assert gpu.judge(plain, plain, truth)["top1"] == 1.0


def _cell(batch: int, red: str | None = None) -> dict[str, Any]:
    def row(name: str, ms: float) -> dict[str, Any]:
        return {
            "label": name, "of_allowed": 0.3, "top1": 1.0, "eager_top1": 1.0, "prepare_s": 2.0, "median_ms": ms,
            "q20_ms": ms, "q80_ms": ms, "min_ms": ms, "calls": 5,
        }  # fmt: skip

    return gpu._derive(
        {
            "model": "mobilenetv4_conv_small", "batch": batch, "dtype": "float16", "resolution": 224,
            "weights": "random, seeded", "input": "random numbers", "red": red,
            "graphs": {name: row(label, 1.0 + i) for i, (name, label) in enumerate(reversed(gpu.GRAPHS.items()))},
            "calls": {name: row(label, 1.0 + i) for i, (name, label) in enumerate(gpu.CALLS.items())},
            "unavailable": {"calls compile": "it did not"}, "served": {"fused": 20, "original": []},
            "memory": {"eager_cl": 40 * 2**20, "mnv4_ops": 10 * 2**20},
        }
    )  # fmt: skip


def test_reports() -> None:
    cells = [_cell(1), _cell(8, red="wrong answer")]
    assert cells[0]["graphs"]["mnv4_ops"]["speedup_vs_best_peer"] == 2.0
    assert cells[0]["calls"]["mnv4_ops"]["best_peer"] == "eager"
    assert cells[0]["memory_ratio"] == 0.25
    env = {
        "gpu": {"name": "NVIDIA H100"},
        "date": "2026-11-24T00:00:00",
        "commit": "abc",
        "packages": {"torch": "2.11"},
    }
    document = gpu_report.document(env, {}, cells)
    text = gpu_report.markdown(json.loads(json.dumps(document)))
    assert "NVIDIA H100" in text
    assert "2.00x" in text
    assert "red: no speed" in text
    assert "0.25x" in text
    gpu_report.cell_table(cells[0])
    assert any("left out" in note for note in gpu_report.cell_notes(cells[0]))
    assert len(gpu_report.summary(cells)) == 3


def test_a_sitting_that_is_cut_off_leaves_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any (model, batch) by itself; what is measured is on disk before the next begins, and joins what was there."""
    from mnv4_ops.bench import inputs
    from mnv4_ops.bench import run as cpu_run

    environment = {"gpu": {"name": "x"}, "date": "2026-11-29T00:00:00", "commit": "abc", "packages": {}, "cpu": {}}
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(inputs, "fetch_weights", lambda model: "random")
    monkeypatch.setattr(gpu_run, "environment", lambda: environment)
    file, text = tmp_path / "gpu.json", tmp_path / "gpu.md"

    def on_disk() -> list[tuple[str, int]]:
        if not file.is_file():
            return []
        return [(cell["model"], cell["batch"]) for cell in json.loads(file.read_text())["cells"]]

    before: list[Any] = []

    def run_cell(task: Any, request: gpu.GpuRequest, *rest: Any, **more: Any) -> dict[str, Any]:
        before.append(on_disk())
        if request.batch == 256:
            raise RuntimeError("out of memory")
        return _cell(request.batch) | {"model": request.model}

    monkeypatch.setattr(cpu_run, "run_cell", run_cell)
    common = ["bench", "--device", "cuda", "--keep", "--json", str(file), "--markdown", str(text)]

    def bench(model: str, batch: str) -> int:
        return CliRunner().invoke(app, [*common, "--model", model, "--batch", batch]).exit_code

    assert bench("hybrid_medium", "64,1,256,8") == 2
    medium = [("mobilenetv4_hybrid_medium", n) for n in (64, 1)]
    assert before == [[], medium[:1], medium]
    assert on_disk() == medium
    assert bench("hybrid_large", "64") == 0
    assert on_disk() == [*medium, ("mobilenetv4_hybrid_large", 64)]
    assert "hybrid_large 224" in text.read_text()


@needs_native
@pytest.mark.parametrize("wrong", [False, True])
def test_a_tiny_cell(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `measure` but the GPU."""
    # measure sets it
    monkeypatch.setenv("MNV4_OPS_STRICT", "0")
    pytest.importorskip("timm")
    pytest.importorskip("skimage")
    monkeypatch.setattr(gpu, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu, "_left_out", lambda name, dtype: None)
    monkeypatch.setattr(gpu_clock, "captured", lambda run: run)
    monkeypatch.setattr(gpu_clock.interleave, "__kwdefaults__", {**gpu_clock.interleave.__kwdefaults__, "span": _wall})
    monkeypatch.setattr(gpu_clock, "cold_span", _wall)
    monkeypatch.setattr(gpu, "_COLD_ROUNDS", 1)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)
    peers = ("cudnn_graph", "eager", "eager_cl")
    request = gpu.GpuRequest("mobilenetv4_conv_small", 2, "float16", 64, None, peers, "test", rounds=1, seconds=0.1)
    events: list[Any] = []
    # a second thread on a busy core makes every parallel region wait for it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with standin.serving_cpu(monkeypatch) as patch:
        if wrong:
            write = standin._Runner._write
            patch.setattr(standin._Runner, "_write", lambda self, x, y, *a: write(self, x, y * 1.05, *a))
        cell = gpu.measure(request, events.append)
    torch.set_num_threads(threads)
    assert events[0] == {"stage": "load"}
    if wrong:
        assert "wrong answer" in cell["red"]
        assert not any("median_ms" in facts for facts in cell["graphs"].values())
        return
    assert cell["red"] is None
    assert set(cell["graphs"]) == {"cudnn_graph", "mnv4_ops"}
    assert set(cell["calls"]) == {"eager", "eager_cl", "mnv4_ops", "mnv4_ops_graphs"}
    assert not cell["unavailable"]
    assert cell["calls"]["mnv4_ops"]["speedup_vs_best_peer"] > 0
    assert cell["graphs"]["mnv4_ops"]["best_peer"] == "cudnn_graph"
    assert all(facts["cold_median_ms"] > 0 for facts in cell["graphs"].values())
    assert cell["served"]["fused"] == 18
    assert not cell["served"]["original"]
    assert cell["memory_ratio"] == 1.0
    assert "conv_small 64" in str(gpu_report.tables([json.loads(json.dumps(cell))]))


def _wall(run: Any, count: int) -> float:
    import time

    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_plan() -> None:
    plan = gpu_run.GpuPlan(["mobilenetv4_conv_small"], [1, 8], ["float16", "float32"], peers="eager_cl, compile_graph")
    assert plan.chosen() == ("eager_cl", "compile_graph")
    assert len(plan.cells()) == 4
    everything = gpu_run.GpuPlan([], [], []).chosen()
    assert "compile_graph" in everything
    assert "freeze_graph" not in everything
    assert gpu_run.GpuPlan([], [], [], peers="freeze_graph").chosen() == ("freeze_graph",)
    with pytest.raises(BenchError, match="no peer 'openvino' on a GPU; known: all, none, cudnn_graph"):
        gpu_run.GpuPlan([], [], [], peers="openvino").chosen()


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNV4_OPS_CACHE", str(tmp_path))
    assert (tuning.shipped_folder() / "index.json").is_file()
    monkeypatch.setattr(tuning, "shipped_folder", lambda: tmp_path / "shipped")
    name = "NVIDIA H100 80GB HBM3"
    tuning.table.cache_clear()
    assert tuning.table(name) == {}
    assert tuning.describe(name)["own"] is None
    (tmp_path / "shipped").mkdir()
    shipped = {"format": 1, "entries": {"a": {"1x7x7": {"p": 1}, "8x7x7": {"p": 2}}}}
    (tmp_path / "shipped" / "nvidia_h100_80gb_hbm3.json").write_text(json.dumps(shipped))
    file = tuning.save(name, {"a": {"8x7x7": {"p": 3}}, "b": {"1x1x1": {"p": 4}}})
    assert file == tmp_path / "tuned" / "nvidia_h100_80gb_hbm3.json"
    want = {"a": {"1x7x7": {"p": 1}, "8x7x7": {"p": 3}}, "b": {"1x1x1": {"p": 4}}}
    assert tuning.table(name) == want
    tuning.save(name, {"b": {"2x1x1": {"p": 5}}})
    assert tuning.table(name)["b"] == {"1x1x1": {"p": 4}, "2x1x1": {"p": 5}}
    assert tuning.describe(name) == {"shipped": 2, "own": 3, "own_file": str(file)}
    file.write_text("{ damaged")
    tuning.table.cache_clear()
    assert tuning.table(name) == shipped["entries"]
    assert tuning.table("NVIDIA H200") == {}
    family = {"names": ["NVIDIA H100", "NVIDIA H200"], "tables": ["nvidia_h100_80gb_hbm3", "nvidia_h200"]}
    (tmp_path / "shipped" / "index.json").write_text(json.dumps({"format": 1, "families": [family]}))
    tuning.table.cache_clear()
    assert tuning.table("NVIDIA H200") == tuning.table("NVIDIA H200 NVL") == shipped["entries"]
    assert tuning.table("NVIDIA A100-SXM4-80GB") == {}
    assert tuning.describe("NVIDIA H200")["shipped"] == 2
    other = {"format": 1, "entries": {"a": {"8x7x7": {"p": 9}}, "c": {"1x7x7": {"p": 9}}}}
    (tmp_path / "shipped" / "nvidia_h200.json").write_text(json.dumps(other))
    tuning.table.cache_clear()
    # the GPU's own entries before its family's
    assert tuning.table(name) == {**shipped["entries"], "c": {"1x7x7": {"p": 9}}}
    assert tuning.table("NVIDIA H200")["a"] == {"1x7x7": {"p": 1}, "8x7x7": {"p": 9}}
    tuning.table.cache_clear()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNV4_OPS_CACHE", raising=False)
    monkeypatch.setattr(tuning.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuning.cache_folder() == Path("/somewhere/mnv4_ops")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_folder() == Path.home() / ".cache" / "mnv4_ops"


def test_tune_keeps_what_the_kernels_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setenv("MNV4_OPS_CACHE", str(tmp_path))
    asked: list[Any] = []

    class Kernels:
        @staticmethod
        def tune(jobs: Any, dtype: torch.dtype, batches: Any, *, tf32: bool, log: Any) -> dict[str, Any]:
            asked.append((len(jobs), dtype, batches, tf32))
            log("1 us")
            return {f"{dtype} x": {f"{n}x1x1": {} for n in batches}}

    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "kernels", lambda: Kernels)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA Test")
    lines: list[str] = []
    file, count = tuning.tune(["mobilenetv4_conv_small"], ["float16", "bfloat16"], [1, 8], log=lines.append)
    assert count == 4
    assert file.is_file()
    assert lines == ["1 us"] * 2
    jobs = tuning.jobs(["mobilenetv4_conv_small"])
    assert asked == [(len(jobs), dtype, (1, 8), False) for dtype in (torch.float16, torch.bfloat16)]
    assert "c_feat" in jobs[-1][0]
    assert len({repr(job) for job in jobs}) == len(jobs)
    tuning.table.cache_clear()


@needs_native
@pytest.mark.parametrize(
    "spec",
    [UIBSpec(16, 32, 16, 3, 5, residual=True, layer_scale=True), ConvSpec(3, 8, 3, 2), HeadSpec(8, 16, 24, 10)],
    ids=str,
)
def test_the_suite_of_the_gpu(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = check.Case("test", spec, 2, 9, 7, True)
    with standin.serving_cpu(monkeypatch):
        results = check_gpu.run_case(case, check_gpu.DTYPES, torch.device("cpu"))
        assert [r.case.spec.dtype for r in results] == list(check_gpu.DTYPES)
        assert all(r.ok for r in results), results
        write = standin._Runner._write
        monkeypatch.setattr(standin._Runner, "_write", lambda self, x, y, *a: write(self, x, y * 1.05, *a))
        assert not any(r.ok for r in check_gpu.run_case(case, check_gpu.DTYPES, torch.device("cpu")))


def test_reasons_for_no_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    unavailable = cuda.unavailable.__wrapped__
    monkeypatch.setattr(_native, "core", object())
    versions = {"triton": "3.6.0"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert unavailable() == "GPU kernels need torch >= 2.10, this is 2.9.1"
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    versions["triton"] = "3.5.1"
    assert unavailable() == "GPU kernels need triton >= 3.6, this is 3.5.1"
    del versions["triton"]
    assert unavailable() == "GPU kernels need triton >= 3.6, which is not installed"
    versions["triton"] = "3.10.0"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built without GPU support" in unavailable()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable() == "torch sees no GPU: no device, or no driver for it"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    assert unavailable() == "GPU kernels need compute capability 8.0, cuda:0 (Tesla T4) has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    def broken() -> Any:
        raise ImportError("no such thing")

    monkeypatch.setattr(cuda, "kernels", broken)
    assert unavailable() == "the GPU kernels could not be loaded: ImportError: no such thing"


def test_info_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from mnv4_ops import _info

    monkeypatch.setenv("MNV4_OPS_CACHE", str(tmp_path))
    found = types.SimpleNamespace(
        name="NVIDIA Test", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(cuda, "unavailable", lambda: "they are on holiday")
    (gpu_facts,) = _info.gpus()
    assert gpu_facts["capability"] == "9.0"
    output = CliRunner().invoke(app, ["info"]).stdout
    assert "NVIDIA Test" in output
    assert "no table for this GPU" in output
    assert "models on a GPU run their original forwards: they are on holiday" in output
    tuning.save("NVIDIA Test", {"a": {"1x1x1": {}, "8x1x1": {}}})
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    output = CliRunner().invoke(app, ["info"]).stdout
    assert "2 entries own" in output
    assert "available: float16, bfloat16, float32" in output
    tuning.table.cache_clear()
