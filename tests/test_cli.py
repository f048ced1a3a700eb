"""The command line: what it prints, its errors (one line, status 2), its JSON, and a tiny bench run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from isolate_helpers import say
from typer.testing import CliRunner

from mnv4_ops import _native, check, cli
from mnv4_ops.bench import blocks, cell, gate, inputs, isolate, machine, report, timing
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.peers import PEERS
from mnv4_ops.cli import app
from mnv4_ops.ops import cuda
from mnv4_ops.spec import MODELS, ledger

runner = CliRunner()
needs_native = pytest.mark.skipif(_native.core is None, reason=f"no native library: {_native.reason}")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_help_names_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("info", "bench", "check"):
        assert command in result.output


def test_info_shows_and_writes(tmp_path: Path) -> None:
    file = tmp_path / "new" / "info.json"
    result = runner.invoke(app, ["info", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "native library" in result.stdout
    facts = json.loads(file.read_text())
    assert set(facts["peers"]) == {peer.name for peer in PEERS}
    assert facts["peers"]["torch_eager"] is None
    if _native.core is not None:
        assert facts["cpu"]["tier"] in facts["cpu"]["tiers"]
        assert facts["cpu"]["tier"] in result.stdout


def test_info_shows_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_peer_reasons", lambda: {"litert": "pip install 'mnv4-ops[litert]'"})
    assert "pip install 'mnv4-ops[litert]'" in runner.invoke(app, ["info"]).stdout


def test_info_json_on_stdout_is_nothing_but_json() -> None:
    result = runner.invoke(app, ["info", "--json", "-"])
    assert json.loads(result.stdout)["version"]


def _text_file(tmp_path: Path) -> str:
    file = tmp_path / "photo.jpg"
    file.write_text("this is no photograph")
    return str(file)


def _cut_image(tmp_path: Path) -> str:
    from PIL import Image

    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    file = tmp_path / "cut.png"
    file.write_bytes(whole.read_bytes()[:2000])
    return str(file)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["bench", "--model", "conv_smal"], ["--model", "'conv_smal'", "did you mean conv_small?"]),
        (["bench", "--model", "mobilenetv4_conv_hugee"], ["--model", "mobilenetv4_conv_large"]),
        (["bench", "--model", "zzzzzzzz"], ["--model", "known:", "all-conv"]),
        (["bench", "--model", ","], ["--model", "at least one"]),
        (["bench", "--image", "nowhere.jpg"], ["--image", "'nowhere.jpg'", "no file"]),
        (["bench", "--batch", "0"], ["--batch", "'0'", "from 1"]),
        (["bench", "--batch", "two"], ["--batch", "'two'"]),
        (["bench", "--batch", "1,-8"], ["--batch", "'-8'"]),
        (["bench", "--batch", ","], ["--batch", "at least one"]),
        (["bench", "--threads", "4096"], ["--threads", "4096", "CPUs"]),
        (["bench", "--peers", "cudnn"], ["--peers", "'cudnn'", "xnnpack"]),
        (["bench", "--repeats", "0"], ["--repeats", "'0'"]),
        (["bench", "--repeats", "many"], ["--repeats", "'many'"]),
        (["bench", "--seconds", "-1"], ["--seconds", "'-1'"]),
        (["bench", "--resolution", "31"], ["--resolution", "'31'"]),
        (["bench", "--json", "."], ["--json", "folder"]),
        (["check", "--json", "."], ["--json", "folder"]),
        (["info", "--json", "."], ["--json", "folder"]),
        pytest.param(["check", "--tier", "sse9"], ["--tier", "'sse9'", "scalar"], marks=needs_native),
    ],
    ids=lambda value: " ".join(value[1:]) if value[0] in ("bench", "check", "info") else None,
)
def test_errors_are_one_line_and_status_2(arguments: list[str], parts: list[str]) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mnv4-ops: error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("make", [_text_file, _cut_image])
def test_a_file_that_is_no_image_is_one_line(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path)
    result = runner.invoke(app, ["bench", "--image", path])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "--image" in line
    assert path in line


def test_without_the_native_library_check_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "core", None)
    monkeypatch.setattr(_native, "reason", "it fell overboard")
    result = runner.invoke(app, ["check"])
    assert result.exit_code == 2
    assert "it fell overboard" in result.stderr


@needs_native
def test_check_writes_json_and_its_status_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = check.cases(quick=True)[:2]
    monkeypatch.setattr(check, "cases", lambda quick: cases)
    file = tmp_path / "check.json"
    result = runner.invoke(app, ["check", "--quick", "--tier", "scalar", "--json", str(file)])
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    assert document["schema"] == "mnv4-ops/check/1"
    assert len(document["results"]) == 2
    assert all(r["ok"] and r["tier"] == "scalar" for r in document["results"])
    assert "2 of 2 checks passed" in result.stdout

    original = check.native_run
    monkeypatch.setattr(check, "native_run", lambda *args: original(*args) * 1.001)
    result = runner.invoke(app, ["check", "--quick", "--tier", "scalar"])
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "0 of 2 checks passed" in result.stdout


@needs_native
def test_a_tiny_bench(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("skimage")
    file, text = tmp_path / "bench.json", tmp_path / "bench.md"
    arguments = [
        "bench",
        "--model",
        "conv_small",
        "--batch",
        "2",
        "--threads",
        "1",
        "--resolution",
        "64",
        "--repeats",
        "2",
    ]
    arguments += ["--peers", "torch_eager_cl", "--json", str(file), "--markdown", str(text)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "random weights" in result.stdout
    assert "Summary" in result.stdout
    document = json.loads(file.read_text())
    assert document["schema"] == report.SCHEMA
    assert {"date", "commit", "packages", "cpu", "cpus"} <= set(document["environment"])
    (row,) = document["cells"]
    assert row["batch"] == 2
    assert row["threads"] == 1
    assert row["resolution"] == 64
    assert row["red"] is None
    assert row["macs"] == 2 * sum(entry.macs for entry in ledger("conv_small", 64))
    assert set(row["variants"]) == {"torch_eager", "torch_eager_cl", "mnv4_ops"}
    for facts in row["variants"].values():
        assert 0 < facts["min_ms"] <= facts["q20_ms"] <= facts["median_ms"] <= facts["q80_ms"]
        assert facts["top1_equal"]
        assert facts["error"] <= gate.TOLERANCE
        assert facts["gflops"] > 0
    assert row["headline"] is False
    assert row["speedup_vs_best_peer"] <= row["speedup_vs_eager"]
    assert "conv_small" in text.read_text()


def _break_the_answer(request: cell.CellRequest, notify: isolate.Notify) -> dict[str, Any]:
    from mnv4_ops.bench import peers

    prepare = type(peers.OURS).prepare
    type(peers.OURS).prepare = lambda *args: (lambda run: lambda: run() * 1.01)(prepare(*args))  # type: ignore[method-assign]
    try:
        return cell.measure_cell(request, notify)
    finally:
        type(peers.OURS).prepare = prepare  # type: ignore[method-assign]


@needs_native
def test_red_prints_no_speed() -> None:
    pytest.importorskip("timm")
    request = cell.CellRequest("mobilenetv4_conv_small", 1, 1, 64, weights_note="test", repeats=1)
    threads = torch.get_num_threads()
    strict = os.environ.get("MNV4_OPS_STRICT")
    try:
        result = _break_the_answer(request, lambda event: None)
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("MNV4_OPS_STRICT", None)
        if strict is not None:
            os.environ["MNV4_OPS_STRICT"] = strict
    assert "wrong answer" in result["red"]
    assert not any("median_ms" in facts for facts in result["variants"].values())
    assert any("red: no speed" in row for row in report._summary_rows([result]))


def test_gate() -> None:
    reference = torch.tensor([[1.0, 2.0, -4.0]])
    assert gate.compare(reference.numpy(), reference).ok
    assert gate.compare(reference + 1e-6, reference).ok
    assert not gate.compare(reference + 1e-3, reference).ok
    assert not gate.compare(reference * float("nan"), reference).ok
    assert not gate.compare(torch.tensor([[2.0, 1.0, -4.0]]), reference, tolerance=1.0).ok
    with pytest.raises(ValueError, match="shape"):
        gate.compare(reference[0], reference)


def test_interleave_times_every_variant() -> None:
    calls: dict[str, int] = {"a": 0, "b": 0}
    rounds: list[tuple[int, int]] = []

    def run(name: str) -> None:
        calls[name] += 1

    variants = {name: (lambda name=name: run(name)) for name in calls}
    stats = timing.interleave(variants, repeats=2, on_round=lambda done, total: rounds.append((done, total)))
    assert set(stats) == set(calls)
    assert rounds == [(1, 2), (2, 2)]
    for name, values in stats.items():
        # once alone and twice for the burst; then a warm-up per round
        assert values.calls == calls[name] - 3 - 2
        assert values.min_ms <= values.q20_ms <= values.median_ms <= values.q80_ms


def test_stats_are_milliseconds() -> None:
    stats = timing.Stats.of([0.001, 0.002, 0.003, 0.004, 0.005])
    assert math.isclose(stats.median_ms, 3)
    assert math.isclose(stats.min_ms, 1)
    assert stats.calls == 5
    assert math.isclose(stats.q20_ms, 1.8)
    assert math.isclose(stats.q80_ms, 4.2)


def test_cpus() -> None:
    cpus = machine.available_cpus()
    assert set(machine.pick_cpus(1)) <= set(cpus)
    assert machine.pick_cpus(len(cpus)) == cpus
    with pytest.raises(BenchError, match="--threads"):
        machine.pick_cpus(len(cpus) + 1)


def test_a_fresh_process_is_pinned_and_its_end_is_noticed() -> None:
    heard: list[Any] = []
    before = machine.available_cpus()
    assert isolate.run(say, "hello", threads=1, notify=heard.append) == (1, 1)
    assert heard == [{"said": "hello"}]
    assert machine.available_cpus() == before
    with pytest.raises(BenchError, match="that was wrong"):
        isolate.run(say, "bench_error", threads=1, notify=heard.append)
    with pytest.raises(RuntimeError, match=r"(?s)exit code 9.*last words"):
        isolate.run(say, "crash", threads=1, notify=heard.append)


def test_models_by_short_name_and_group() -> None:
    pytest.importorskip("timm")
    assert inputs.resolve_models(["conv_small", "mobilenetv4_conv_small"]) == ["mobilenetv4_conv_small"]
    assert inputs.resolve_models(["all"]) == ["mobilenetv4_" + name for name in MODELS]
    assert inputs.ledger_name("mobilenetv4_conv_small.e2400_r224_in1k") == "conv_small"


def test_images_of_a_batch_differ() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("skimage")
    model = inputs.load_model("mobilenetv4_conv_small_035", pretrained=False)
    photos = inputs.photo_batch(inputs.photograph(None), model, batch=4, resolution=64)
    assert photos.shape == (4, 3, 64, 64)
    assert photos.is_contiguous()
    assert photos.dtype == torch.float32
    assert all((photos[i] - photos[j]).abs().max() > 0.1 for i in range(4) for j in range(i))


@needs_native
def test_blocks_table() -> None:
    units = blocks.units("mobilenetv4_conv_small")
    assert units[0].places == ("stem",)
    assert units[-1].places == ("head",)
    counted = sum(len(u.places) * u.spec.macs(u.height, u.width) for u in units)
    assert counted == sum(entry.macs for entry in ledger("conv_small"))
    request = blocks.BlocksRequest("mobilenetv4_conv_small", 1, 1, peers=("torch_eager_cl",))
    small = dataclasses.replace(units[6], height=7, width=5)
    with torch.inference_mode():
        runs, left_out = blocks.variants(small, request)
    assert set(runs) == {"mnv4_ops", "torch_eager_cl"}
    assert not left_out


NO_GPU = cuda.unavailable() is not None


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["bench", "--device", "tpu"], ["--device", "'tpu'", "cpu, cuda"]),
        (["bench", "--dtype", "float16"], ["--dtype", "--device cuda"]),
        (["bench", "--device", "cuda", "--threads", "1"], ["--threads", "--device cpu"]),
        (["bench", "--limit", "60"], ["--limit", "--ops"]),
        (["bench", "--device", "cuda", "--limit", "60"], ["--limit", "--blocks"]),
        (["bench", "--device", "cuda", "--blocks", "--limit", "6"], ["--limit", "'6'"]),
        (["bench", "--device", "cuda", "--dtype", "int8"], ["--dtype", "'int8'", "float16"]),
        (["check", "--device", "cuda", "--tier", "scalar"], ["--tier", "--device cpu"]),
        (["check", "--dtype", "fp16"], ["--dtype", "--device cuda"]),
        (["tune", "--dtype", "int8"], ["--dtype", "'int8'"]),
        (["tune", "--batch", "0"], ["--batch", "'0'"]),
        (["tune", "--model", "conv_smal"], ["--model", "did you mean conv_small?"]),
        pytest.param(["bench", "--device", "cuda"], ["--device cuda"], marks=pytest.mark.skipif(not NO_GPU, reason="")),
        pytest.param(["check", "--device", "cuda"], ["--device cuda"], marks=pytest.mark.skipif(not NO_GPU, reason="")),
        pytest.param(["tune"], ["tune: "], marks=pytest.mark.skipif(not NO_GPU, reason="")),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("bench", "check", "tune") else None,
)
@needs_native
def test_errors_of_the_gpu_commands(arguments: list[str], parts: list[str]) -> None:
    pytest.importorskip("timm")
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("mnv4-ops: error: ")
    for part in parts:
        assert part in line


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_info_says_why_there_are_no_gpu_kernels(tmp_path: Path) -> None:
    file = tmp_path / "info.json"
    result = runner.invoke(app, ["info", "--json", str(file)])
    assert result.exit_code == 0, result.output
    reason = json.loads(file.read_text())["gpu_kernels"]
    assert reason == cuda.unavailable()
    assert "GPU kernels" in result.stdout
