"""Rows of a GPU without one: blocks of the ledger, compiling beside, processes that end, limits, tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from isolate_helpers import say
from typer.testing import CliRunner

from mnv4_ops import _native
from mnv4_ops.bench import (
    ceilings,
    gpu_clock,
    gpu_mqa,
    isolate,
    machine,
    op_gpu,
    op_run,
    ops,
    page_files,
    page_report,
    rows,
)
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.cli import app
from mnv4_ops.spec import MODELS, ledger

needs_native = pytest.mark.skipif(_native.core is None, reason=f"no native library: {_native.reason}")
LIMITS = ceilings.Ceilings(1, {"float16": 1e5}, {"L2": 5e3, "DRAM": 3e3}, {"L1": 0, "L2": 10**6, "L3": 0})


@pytest.mark.parametrize("model", MODELS)
def test_blocks_are_those_of_the_ledger(model: str) -> None:
    found = ops.blocks([model])
    places = [place for _, case in found for place in case.places]
    tail = ("4.0", "pool", "conv_head", "classifier")
    assert sorted(places) == sorted(
        [f"{model} {entry.name}" for entry in ledger(model) if entry.name not in tail] + [f"{model} head"]
    )
    macs = sum(op.macs(case) * len(case.places) for op, case in found)
    assert macs == pytest.approx(sum(entry.macs for entry in ledger(model)), rel=1e-3)


def test_the_first_model_comes_first() -> None:
    plan = op_run.OpsPlan(["conv_medium", "conv_small"], ["all"], [1, 64], [1], ["float16"], "cuda", blocks=True)
    todo = plan.todo()
    models = [case.places[0].split()[0] for _, case, _ in todo]
    assert models == sorted(models)
    assert [setting.batch for _, _, setting in todo[:4]] == [1, 64, 1, 64]
    single = replace(plan, ops=["depthwise", "pointwise"], blocks=False).todo()
    assert [case.places[0].split()[0] for _, case, _ in single] == sorted(
        case.places[0].split()[0] for _, case, _ in single
    )
    attention = replace(plan, models=["all-hybrid"], ops=["mqa"]).todo()
    assert {op for op, _, _ in attention} == {"mqa"}
    assert len(attention) == 2 * len(gpu_mqa.blocks())


def _wall(run: Any, count: int) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Rows of a GPU on the CPU: plain kernels, no graphs, the clock of the host, everything in this process."""
    placed = rows._placed
    monkeypatch.setattr(rows, "_placed", lambda thing, setting: placed(thing, replace(setting, device="cpu")))
    monkeypatch.setattr(rows, "_captured", lambda run: run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(op_gpu, "_alive", lambda: True)
    monkeypatch.setattr(ceilings, "measure_gpu", lambda dtypes: LIMITS)
    monkeypatch.setattr(gpu_clock, "cold_span", _wall)
    monkeypatch.setattr(gpu_clock.interleave, "__kwdefaults__", {**gpu_clock.interleave.__kwdefaults__, "span": _wall})
    monkeypatch.setattr(isolate, "run", lambda task, request, *, notify, **how: task(request, notify))
    threads = torch.get_num_threads()
    with standin.serving_cpu(monkeypatch) as patch:
        yield patch
    torch.set_num_threads(threads)


def _few() -> list[op_gpu.Item]:
    """The first block of each kind, tiny."""
    seen: dict[str, op_gpu.Item] = {}
    for op, case in ops.blocks(["hybrid_large", "conv_small", "conv_medium"]):
        seen.setdefault(op.name, (op.name, op.tiny(case), rows.Setting(2, 1, "float16", "cuda")))
    return list(seen.values())


@needs_native
def test_every_kind_of_block(on_the_host: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    events: list[dict[str, Any]] = []
    peers = ("cudnn_graph", "compile_graph", "compile_expanded_graph")
    request = op_gpu.Request(tuple(_few()), peers, 1, 0.01, time.time() + 600)
    assert op_gpu.measure_rows(request, events.append)
    assert events[0] == {"stage": "ceilings", "limits": LIMITS}
    found = json.loads(json.dumps([event["row"] for event in events[1:]]))
    kinds = {"dense", "pointwise", "fused_ib", "extra_dw", "ib", "convnext", "ffn", "mqa", "head"}
    assert {row["op"] for row in found} == kinds
    for row in found:
        assert row["red"] is None, row
        assert set(row["variants"]) == {"mnv4_ops", *(peers if row["op"] == "mqa" else peers[:2])}
        assert row["headline"]
        assert not row["unavailable"]
        assert row["variants"]["mnv4_ops"]["cold_median_ms"] > 0
        assert row["bound"] in ("L2", "DRAM", "compute")


@needs_native
@pytest.mark.parametrize("name", ["pointwise", "depthwise", "depthwise_pointwise", "dense"])
def test_single_convolutions(name: str, on_the_host: pytest.MonkeyPatch) -> None:
    op = ops.by_name(name)
    for case in op.cases(["conv_small"])[:2]:
        row = rows.measure(op, op.tiny(case), rows.Setting(2, 1, "float16", "cuda"), ("compile_graph",), seconds=0.01)
        assert row["red"] is None, row
        assert row["vs_best_peer"] > 0


@needs_native
def test_compiling_beside_is_silent(on_the_host: pytest.MonkeyPatch) -> None:
    """What cannot be prepared says so in its row, later."""
    items = _few()[:2]
    on_the_host.setattr(rows, "prepare", lambda op, case, setting, peers: 1 / (op.name != items[0][0]))
    events: list[Any] = []
    assert op_gpu.prepare_rows(op_gpu.Request(tuple(items), (), 1, 0.1, time.time() + 60), events.append)
    assert events == [{"stage": "done"}] * 2
    # nothing begins when time is up
    assert op_gpu.prepare_rows(op_gpu.Request(tuple(items), (), 1, 0.1, time.time() - 1), events.append)
    assert len(events) == 2
    on_the_host.setattr(op_gpu, "_alive", lambda: False)
    assert not op_gpu.prepare_rows(op_gpu.Request(tuple(items), (), 1, 0.1, time.time() + 60), events.append)
    assert len(events) == 3


def _item(index: int) -> op_gpu.Item:
    op, case = ops.blocks(["conv_small"])[index]
    return op.name, case, rows.Setting(1, 1, "float16", "cuda")


def test_a_row_that_ends_its_process_is_lost_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    items = tuple(_item(index) for index in range(6))
    starts: list[tuple[op_gpu.Item, ...]] = []

    def run(task: Any, request: op_gpu.Request, *, notify: Any, **how: Any) -> bool:
        starts.append(request.todo)
        for item in request.todo:
            if item is items[1]:
                raise RuntimeError("Traceback\nout of everything")
            notify({"stage": "done", "row": item})
            if item is items[3]:
                return False  # done, but the device answers no more
        return True

    monkeypatch.setattr(isolate, "run", run)
    done, lost = [], []
    request = op_gpu.Request(items, (), 1, 0.1, time.time() + 60)
    op_gpu._go_on(None, request, lambda event: done.append(event["row"]), lambda *what: lost.append(what), threads=1)
    assert done == [items[0], *items[2:]]
    assert lost == [(items[1], "the measuring process failed: out of everything")]
    assert starts == [items, items[2:], items[4:]]


def test_nothing_starts_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **how: Any) -> None:
        starts.append(1)
        raise BenchError("no device")

    items, starts, lost = tuple(_item(index) for index in range(6)), [], []
    monkeypatch.setattr(isolate, "run", run)
    request = op_gpu.Request(items, (), 1, 0.1, time.time() + 60)
    op_gpu._go_on(None, request, lambda event: None, lambda item, reason: lost.append(item), threads=1)
    assert len(starts) == 3
    assert lost == list(items)


def test_a_process_that_hangs_is_ended() -> None:
    heard: list[Any] = []
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="nothing was heard of the process for 0 s"):
        isolate.run(say, "hang", threads=1, notify=heard.append, patience=0.4, cpus=machine.available_cpus())
    assert time.perf_counter() - start < 30


def test_graphs_of_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    class Graph:
        def __init__(self, calls: int) -> None:
            self.calls = calls

        def replay(self) -> None:
            graphs.append(self.calls)

    monkeypatch.setattr(gpu_clock, "_graph_of", lambda run, calls: (Graph(calls), run()))
    monkeypatch.setattr(gpu_clock, "span", lambda run, count: 3e-5)
    replay = gpu_clock.Replay(lambda: "output")
    assert replay() == "output"
    assert graphs == [1]
    replay.several()
    assert graphs == [1, 1]
    replay.repeat()
    assert replay.calls == 4
    replay.several()
    assert replay() == "output"
    assert graphs == [1, 1, 4, 1]


def test_spans_count_the_calls_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        synchronize = record

        def elapsed_time(self, end: Any) -> float:
            return 12.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    replay = gpu_clock.Replay.__new__(gpu_clock.Replay)
    several: list[int] = []
    replay.calls, replay.several = 4, lambda: several.append(1)
    assert gpu_clock.span(replay, 10) == pytest.approx(12e-3 / 12)
    assert len(several) == 3
    single: list[int] = []
    assert gpu_clock.span(lambda: single.append(1), 10) == pytest.approx(12e-3 / 10)
    assert len(single) == 10


@needs_native
def test_the_command(on_the_host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_the_host.setattr(machine, "available_cpus", lambda: [0])
    monkeypatch = on_the_host
    few = [(op, op.tiny(case)) for op, case in ops.blocks(["conv_small"])[:3]]
    blocks = ops.blocks
    monkeypatch.setattr(ops, "blocks", lambda models, resolution=None: few if resolution else blocks(models))
    parts: list[int] = []
    collect = op_gpu.collect

    def watched(*args: Any, on_row: Any, **options: Any) -> Any:
        def one(limits: Any, found: Any) -> None:
            on_row(limits, found)
            parts.append(len(json.loads(file.read_text())["rows"]))

        return collect(*args, on_row=one, **options)

    monkeypatch.setattr(op_gpu, "collect", watched)
    file, text = tmp_path / "gpu_blocks.json", tmp_path / "gpu_blocks.md"
    arguments = [
        "bench",
        "--blocks",
        "--device",
        "cuda",
        "--model",
        "conv_small",
        "--batch",
        "1,2",
        "--resolution",
        "64",
    ]
    arguments += ["--peers", "compile_graph", "--repeats", "1", "--seconds", "1", "--limit", "300"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(file), "--markdown", str(text)])
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    assert parts == [1, 2, 3, 4, 5, 6]
    assert document["blocks"]
    assert [row["batch"] for row in document["rows"]] == [1, 2] * 3
    assert "not_measured" not in document
    markdown = text.read_text()
    assert "| case | batch | dtype | MB | GFLOP | mnv4_ops us |" in markdown
    assert "dense k x k convolution" in markdown
    assert "1/6 dense 3-32 k3 s2" in result.stdout
    again = CliRunner().invoke(app, [*arguments, "--ops", "ib", "--keep", "--json", str(file), "--markdown", str(text)])
    assert again.exit_code == 0, again.output
    assert len(json.loads(file.read_text())["rows"]) == 6
    pytest.importorskip("matplotlib")
    _, _, sections = page_report.build(tmp_path)
    (made,) = (section for section in sections if section.title.startswith("Blocks on a GPU"))
    against, *others = made.tables
    assert against.columns == ("op", "rows", page_files.LABELS["compile_graph"])
    assert [table.columns[3] for table in others] == ["MB"] * len(others)


def test_sums_of_whole_models_and_what_is_left() -> None:
    def row(op: str, case: Any, red: str | None = None) -> dict[str, Any]:
        found = {"op": op, "case": case.name, "places": list(case.places), "batch": 1, "threads": 1, "dtype": "float16"}
        found |= {"device": "cuda", "macs": 5 * 10**5, "bytes": 1000, "unavailable": {}, "red": red}
        times = {"mnv4_ops": 0.02, "compile_graph": 0.05, "compile_expanded_graph": 0.04}
        variants = {name: {"median_ms": ms, "q20_ms": ms, "q80_ms": ms} for name, ms in times.items()}
        return rows.derive(found | {"variants": variants}, LIMITS)

    document = {"blocks": True, "ceilings": [], "rows": [row(op.name, case) for op, case in ops.blocks(["conv_small"])]}
    blocks = sum(len(case.places) for _, case in ops.blocks(["conv_small"]))
    (line,) = (line for line in op_run.notes(document) if line.startswith("blocks of"))
    assert line.startswith("blocks of conv_small one after another, batch 1, float16: ")
    assert f"{0.02 * blocks:.3f} ms, the best peer of each {0.04 * blocks:.3f} ms (2.00x), limit" in line
    document["not_measured"] = ["ib x, batch 64"]
    notes = op_run.notes(document | {"rows": document["rows"][1:]})
    assert not any(line.startswith("blocks of") for line in notes)
    assert "no time for 1 rows: ib x, batch 64" in notes


def test_attention_is_quoted_against_both_forms() -> None:
    row = {"op": "mqa", "device": "cuda"}
    assert rows.headline_peers(row) == ("compile_graph", "compile_expanded_graph")
    assert rows.headline_peers(row | {"op": "ib"}) == ("compile_graph",)
    assert rows.headline_peers(row | {"device": "cpu"}) == rows.HEADLINE["cpu"]
