"""`--keep`: a measurement in several sittings in one result file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mnv4_ops import cli_common
from mnv4_ops.bench import gpu_report, join, machine, op_run, pareto, report
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.run import Outcome
from mnv4_ops.cli import app

runner = CliRunner()
ENVIRONMENT = {"commit": "abc", "packages": {"torch": "2"}, "cpu": {"model": "x"}, "date": "2026-01-01"}


def _row(op: str, case: str, threads: int, ms: float) -> dict[str, Any]:
    ours = {"median_ms": ms, "q20_ms": ms, "q80_ms": ms}
    row = {"op": op, "case": case, "batch": 1, "threads": threads, "dtype": "float32", "device": "cpu"}
    return row | {"variants": {"mnv4_ops": ours}, "best_peer": None, "red": None, "headline": False, "unavailable": {}}


def _ops(threads: int, peak: float, seconds: int, *rows: dict[str, Any]) -> dict[str, Any]:
    limit = {"threads": threads, "peak_gflops": {"float32": peak}, "bandwidth_gbs": {}, "capacity": {}}
    document = {"schema": op_run.SCHEMA, "environment": copy.deepcopy(ENVIRONMENT), "method": {"seconds": seconds}}
    return document | {"ceilings": [limit], "rows": list(rows)}


def test_results_are_joined_by_what_they_are() -> None:
    old = _ops(2, 200.0, 30, _row("ib", "a", 2, 0.5), _row("head", "b", 2, 0.7))
    first = _ops(1, 100.0, 40, _row("ib", "a", 1, 0.9))
    document, text = join.joined(old, first)
    assert [(row["op"], row["threads"]) for row in document["rows"]] == [("ib", 2), ("head", 2), ("ib", 1)]
    assert [limit["threads"] for limit in document["ceilings"]] == [1, 2]
    assert document["method"]["seconds"] == 70
    assert "500.0" in text
    again = _ops(2, 210.0, 5, _row("ib", "a", 2, 0.25))
    document, text = join.joined(document, again)
    assert [row["variants"]["mnv4_ops"]["median_ms"] for row in document["rows"]] == [0.25, 0.7, 0.9]
    assert document["ceilings"][1]["peak_gflops"]["float32"] == 210.0
    assert "250.0" in text
    assert "500.0" not in text


def test_points_and_cells_are_joined() -> None:
    point = {"checkpoint": "a.b", "measured_resolution": 224, "model": "a", "family": "A", "top1": 70.0}
    point |= {"before_ms": 2.0, "after_ms": None}
    old = {"schema": pareto.SCHEMA, "environment": ENVIRONMENT, "method": {}, "threads": 1, "points": [point]}
    document, _ = join.joined(old, old | {"points": [point | {"before_ms": 1.0}, point | {"measured_resolution": 64}]})
    assert [p["before_ms"] for p in document["points"]] == [1.0, 2.0]
    cell = {
        "model": "mobilenetv4_conv_small",
        "resolution": 224,
        "batch": 1,
        "variants": {},
        "red": "wrong",
        "threads": 1,
    }
    models = {"schema": report.SCHEMA, "environment": ENVIRONMENT, "method": {}, "cells": [cell]}
    document, _ = join.joined(models, models | {"cells": [cell | {"threads": 2}]})
    assert [c["threads"] for c in document["cells"]] == [1, 2]


def test_only_the_same_commit_packages_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "ops.json"
    assert join.earlier(file, op_run.SCHEMA, ENVIRONMENT) is None
    document = _ops(1, 1.0, 1)
    file.write_text(json.dumps(document))
    # the date and the platform may differ
    assert join.earlier(file, op_run.SCHEMA, ENVIRONMENT | {"date": "2027-01-01"}) == document
    for key, value in (("commit", "def"), ("packages", {}), ("cpu", {"model": "y"}), ("gpu", {"name": "z"})):
        with pytest.raises(BenchError, match=f"another {key}"):
            join.earlier(file, op_run.SCHEMA, ENVIRONMENT | {key: value})
    with pytest.raises(BenchError, match="another threads: None, here 2"):
        join.earlier(file, op_run.SCHEMA, ENVIRONMENT, threads=2)
    for schema in (gpu_report.SCHEMA, "mnv4-ops/blocks/1"):
        with pytest.raises(BenchError, match="no results that these can join"):
            join.earlier(file, schema, ENVIRONMENT)
    file.write_text("[")
    with pytest.raises(BenchError, match="no results that these can join"):
        join.earlier(file, op_run.SCHEMA, ENVIRONMENT)


def test_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, text = tmp_path / "ops.json", tmp_path / "ops.md"
    monkeypatch.setattr(machine, "environment", lambda: ENVIRONMENT)
    threads = iter((1, 2))

    def run(plan: Any, console: Any, save: Any = None) -> Outcome:
        document = _ops(next(threads), 1.0, 1, _row("ib", "a", plan.threads[0], 0.5))
        return Outcome(document, "", True)

    monkeypatch.setattr(op_run, "run", run)
    monkeypatch.setattr(machine, "pick_cpus", lambda count: list(range(count)))
    for count in ("1", "2"):
        arguments = ["--ops", "ib", "--threads", count, "--json", str(file), "--markdown", str(text), "--keep"]
        result = runner.invoke(app, ["bench", *arguments])
        assert result.exit_code == 0, result.output
    assert [row["threads"] for row in json.loads(file.read_text())["rows"]] == [1, 2]
    assert text.read_text().count("| a |") == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["bench", "--ops", "ib", "--threads", "1", "--keep"], "--keep: goes with --json FILE"),
        (["bench", "--blocks", "--keep"], "--keep: does not go with --blocks"),
        (["pareto", "--keep", "--json", "-"], "--keep: goes with --json FILE"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line(arguments: list[str], part: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert part in line


def test_a_red_outcome_is_written_and_counts(tmp_path: Path) -> None:
    file = tmp_path / "ops.json"
    with pytest.raises(BaseException) as caught:
        cli_common.finish(Outcome({"rows": []}, "", False), file, None)
    assert getattr(caught.value, "exit_code", None) == 1
    assert json.loads(file.read_text()) == {"rows": []}


def test_what_one_sitting_had_no_time_for() -> None:
    row = _row("ib", "a", 1, 0.5)
    b, c, d = (f"{name}, batch 1, 1 thread, float32" for name in ("ib b", "ib c", "ffn d"))
    old = _ops(1, 1.0, 1, row) | {"not_measured": [b, c]}
    new = _ops(1, 1.0, 1, _row("ib", "b", 1, 0.5)) | {"not_measured": [d]}
    document, text = join.joined(old, new)
    assert document["not_measured"] == [c, d]
    assert "no time for 2 rows: ib c" in text
    assert "not_measured" not in join.joined(_ops(1, 1.0, 1, row), _ops(1, 1.0, 1, row))[0]
