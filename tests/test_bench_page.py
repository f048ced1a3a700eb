"""The report, the Pareto front, the comparison of result files, and what is committed under benchmarks/results."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mnv4_ops import _native
from mnv4_ops.bench import (
    cell,
    compare,
    gpu,
    op_run,
    page,
    page_files,
    page_gpu,
    page_plots,
    page_report,
    page_sections,
    pareto,
    rows,
)
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.cli import app

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
runner = CliRunner()
needs_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="needs a checkout")


def _ops() -> dict[str, Any]:
    names = ("mnv4_ops", "torch_eager", *rows.HEADLINE["cpu"])
    found = []
    for op, case, threads in (
        ("ib", "96-192-96 k3 @14x14", 1),
        ("ib", "96-192-96 k3 @14x14", 2),
        ("mqa", "160 h4 @16x16", 1),
    ):
        variants = {
            name: {"median_ms": 0.1 + 0.01 * i, "q20_ms": 0.099, "q80_ms": 0.102 + 0.01 * i, "min_ms": 0.09, "calls": 9}
            for i, name in enumerate(names)
        }
        row = {"op": op, "case": case, "places": ["conv_small 2.1"], "batch": 1, "threads": threads, "dtype": "float32"}
        row |= {"device": "cpu", "macs": 10**7, "bytes": 10**5, "variants": variants, "unavailable": {}, "red": None}
        found.append(rows.derive(row))
    red = copy.deepcopy(found[0]) | {"case": "red <one>", "variants": {}, "red": "wrong answer: 7 of the allowed error"}
    environment = json.loads((RESULTS / "x86.json").read_text())["environment"]
    limits = {"threads": 1, "peak_gflops": {"float32": 200.0}, "bandwidth_gbs": {"L1": 300.0}, "capacity": {"L1": 1}}
    document = {"schema": op_run.SCHEMA, "environment": environment, "method": {"gate": "first"}}
    return document | {"ceilings": [limits], "rows": [*found, rows.derive(red)]}


def _pareto() -> dict[str, Any]:
    def point(model: str, family: str, top1: float, before: float, after: float | None) -> dict[str, Any]:
        facts = {"model": model, "family": family, "top1": top1, "before_ms": before, "after_ms": after}
        return facts | {"source": "a paper", "resolution": 224, "measured_resolution": 224}

    points = [
        point("conv_small", "MobileNetV4", 73.8, 6.0, 1.8),
        point("conv_medium", "MobileNetV4", 79.9, 27.0, 9.5),
        point("mobilenetv2_100", "MobileNetV2", 73.0, 5.0, None),
    ]
    environment = json.loads((RESULTS / "x86.json").read_text())["environment"]
    return {"schema": pareto.SCHEMA, "environment": environment, "method": {}, "threads": 1, "points": points}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The page and the Markdown of the committed results, of ops and of a Pareto front."""
    if not RESULTS.is_dir():
        pytest.skip("needs a checkout")
    for name in ("matplotlib", "jinja2", "timm"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("report")
    results = folder / "results"
    shutil.copytree(RESULTS, results)
    (results / "some_ops.json").write_text(json.dumps(_ops()))
    (results / "some_pareto.json").write_text(json.dumps(_pareto()))
    html, text = folder / "report.html", folder / "report.md"
    result = runner.invoke(app, ["report", "--results", str(results), "--out", str(html), "--markdown", str(text)])
    assert result.exit_code == 0, result.output
    return html, text


def test_the_page_holds_everything_and_needs_nothing(written: tuple[Path, Path]) -> None:
    html = written[0].read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]+"', re.sub(r"<svg.*?</svg>", "", html, flags=re.S))
    assert not re.findall(r"(?:src|xlink:href|href)=\"https?:", html)
    for anchor in ("summary", "x86", "h100", "arm", "some_ops", "some_pareto", "roofline"):
        assert f'<section id="{anchor}">' in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(set(ids)) == len(ids)
    assert html.count("<svg") == html.count("</svg>") >= 6
    assert "red &lt;one&gt;" in html
    assert "wrong answer: 7 of the allowed error" in html
    assert 'class="good"' in html


def test_markdown_has_the_same_tables(written: tuple[Path, Path]) -> None:
    html, text = (file.read_text() for file in written)
    assert text.startswith(f"# {page_report.TITLE}\n")
    assert text.count("\n### ") == html.count("<caption>")
    lengths: dict[str, set[int]] = {}
    for block in text.split("\n### ")[1:]:
        lines = [line for line in block.splitlines() if line.startswith("|")]
        lengths[block.splitlines()[0]] = {line.replace("\\|", "").count("|") for line in lines}
    assert all(len(found) == 1 for found in lengths.values()), lengths


def test_the_section_of_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def facts(ms: float, **more: float) -> dict[str, float]:
        return {"median_ms": ms, "cold_median_ms": 2 * ms, **more}

    found = {"model": "mobilenetv4_conv_small", "resolution": 224, "batch": 8, "dtype": "float16", "red": None}
    found |= {"graphs": {"compile_graph": facts(0.3), "mnv4_ops": facts(0.1, speedup_vs_best_peer=3.0)}, "calls": {}}
    found |= {"memory": {"eager_cl": 2**22, "mnv4_ops": 2**21}}
    bare = found | {"batch": 1, "memory": {}, "graphs": {"mnv4_ops": facts(0.1, speedup_vs_best_peer=5.0)}}
    block = {"model": "conv_small", "block": "dense 3-32 k3s2 none-none-relu symmetric", "height": 4, "width": 5}
    blocks = [block | {"times_in_model": 2, "batch": batch, "us": us} for batch, us in ((8, 6.0), (1, 2.0))]
    rows_of_mqa = [
        {"block": "hybrid 8x8", "dtype": "torch.float16", "batch": 1, "us": {"timm": 50.0, "mnv4_ops": 20.0}}
    ]
    rows_of_mqa[0]["speedup"] = 2.5
    document = {"device": "GPU", "cells": [found, bare], "blocks": blocks, "mqa": rows_of_mqa}
    section = page_gpu.section("h", document)
    tables = {table.caption.split(",")[0]: table for table in section.tables}
    assert len(tables) == 4
    graphs = tables["CUDA graph against CUDA graph"]
    texts = [dict(zip(graphs.columns, (cell.text for cell in row), strict=True)) for row in graphs.rows]
    assert [row["vs best peer"] for row in texts] == ["3.00x", "5.00x *"]
    assert texts[0]["mnv4_ops + CUDA graph, cold L2"] == "0.200"
    notes = [note for note in section.notes if "no headline" in note]
    assert notes == ["* no headline: torch.compile + CUDA graph is missing in conv_small 224"]
    hybrid = found | {"model": "mobilenetv4_hybrid_medium"}
    section = page_gpu.section("h", document | {"cells": [found, hybrid]})
    notes = [note for note in section.notes if "no headline" in note]
    assert notes == ["* no headline: torch.compile, K/V expanded, + CUDA graph is missing in hybrid_medium 224"]
    assert [cell.text for cell in tables["Peak memory of a forward without the model's own weights"].rows[0]][3:] == [
        "4", "2", "0.50"
    ]  # fmt: skip
    (row,) = tables["Convolution blocks of mnv4_ops"].rows
    assert [cell.text for cell in row] == ["conv_small dense 3-32 k3s2 relu", "4 x 5", "2", "2.0", "6.0"]
    (row,) = tables["Mobile MQA blocks"].rows
    assert [cell.text for cell in row] == ["hybrid 8x8", "float16", "1", "50.0", "20.0", "2.50x"]
    summary = page_sections.summary({"h": document}).tables[0]
    assert [row[3].text for row in summary.rows] == ["3.00x", "2.50x"]
    # the rows of benchmarks/gpu_mqa.py alone, and a list that is no result
    (tmp_path / "mqa_bench.json").write_text(json.dumps(rows_of_mqa))
    (tmp_path / "other.json").write_text("[1]")
    assert list(page_files.load(tmp_path)) == ["mqa_bench"]
    assert len(page_gpu.section("m", page_files.load(tmp_path)["mqa_bench"]).tables) == 1


@needs_results
def test_red_cells_of_models_are_seen() -> None:
    pytest.importorskip("matplotlib")
    document = json.loads((RESULTS / "x86_avx2.json").read_text())
    first, second, *_ = document["cells"]
    first["red"] = "wrong answer"
    second["headline"] = False
    section = page_sections.models("x", document)
    assert section.title.endswith(", avx2")
    table, every = section.tables
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert [cell.text for cell in table.rows[0]][3:5] == ["red: no speed", ""]
    assert section.notes[0].startswith("red, no speed: conv_small 224, batch 1")
    assert section.notes[-1].startswith("* no headline")
    versus = table.rows[1][table.columns.index("vs best")]
    assert versus.text.endswith("x *")
    assert versus.mood == "bad"
    # what every other peer took, those of some cells alone too
    assert len(every.rows) == len(document["cells"]) - 1
    assert {"LiteRT", "ncnn", "torch.compile", "mnv4_ops"} & set(every.columns) >= {"torch.compile", "mnv4_ops"}


def test_columns_of_words_are_told_from_numbers() -> None:
    number, words, span = page.Cell.number(1.0, ".1f"), page.Cell("avx512"), page.Cell("1.0 - 2.0")
    assert page.Table("", ("a", "b", "c"), [[number, words, span]]).texts == {1}
    assert str(page._breakable("enable(x=True)<b>")) == "enable(<wbr>x=<wbr>True)&lt;b&gt;"


def _browse(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"waits for a browser: none of {', '.join(BROWSERS)} is installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,5000"]
    return subprocess.run([browser, *options, *arguments], capture_output=True, timeout=120, check=False)


def test_the_page_in_a_browser(written: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    shot = tmp_path / "page.png"
    done = _browse(f"--screenshot={shot}", f"file://{written[0]}")
    assert shot.is_file(), done.stderr[-2000:]
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    assert not console, console
    with Image.open(shot) as image:
        assert image.size[0] == 1400
        # a page of text and figures: not blank, and mostly paper
        colours = image.convert("RGB").resize((140, 500)).getcolors(70000)
    assert len(colours) > 100
    assert max(colours)[0] > 20000


def test_headings_sort_in_a_browser(written: tuple[Path, Path], tmp_path: Path) -> None:
    script = """<script>
    const table = document.querySelector("#x86 table"), button = table.querySelectorAll("th button")[3];
    const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[3].dataset.key));
    const before = column();
    button.click(); const up = column();
    button.click(); const down = column();
    document.title = JSON.stringify([before, up, down, button.parentElement.getAttribute("aria-sort")]);
    </script></body>"""
    copied = tmp_path / "sorting.html"
    copied.write_text(written[0].read_text().replace("</body>", script))
    done = _browse("--dump-dom", f"file://{copied}")
    title = re.search(r"<title>(.*?)</title>", done.stdout.decode())
    assert title is not None, done.stderr[-2000:]
    before, up, down, state = json.loads(title.group(1))
    assert len(before) > 5
    assert up == sorted(before)
    assert down == sorted(before, reverse=True)
    assert state == "descending"


def test_errors_of_the_report(tmp_path: Path) -> None:
    for folder, part in ((tmp_path / "nowhere", "expected a folder"), (tmp_path, "no result files")):
        result = runner.invoke(app, ["report", "--results", str(folder), "--out", str(tmp_path / "x.html")])
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()
        assert part in line
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(BenchError, match="is no JSON"):
        page_files.load(tmp_path)


def test_moods_of_ratios() -> None:
    assert [page.Cell.ratio(value).mood for value in (1.2, 1.001, 0.998, 0.9)] == ["good", "", "", "bad"]
    assert [page.Cell.against_best(1.2, found).mood for found in (True, False)] == ["good", "bad"]
    assert page.Cell.ratio(None).text == ""


@needs_results
def test_committed_headlines_have_their_peers() -> None:
    """Red: a headline row without XNNPACK, ONNX Runtime and OpenVINO (CPU), or torch.compile + CUDA graph (GPU; of the
    hybrids its form with expanded keys and values).
    """
    seen = set()
    for stem, document in page_files.load(RESULTS).items():
        kind = page_files.kind_of(document)
        seen.add(kind)
        if kind == "models":
            for found in document["cells"]:
                where = (stem, found["model"], found["batch"], found["threads"])
                assert found["red"] is None, where
                assert set(cell.HEADLINE_PEERS) <= set(found["variants"]), where
                assert found["headline"], where
                others = {n: f["median_ms"] for n, f in found["variants"].items() if n != cell.OURS}
                assert found["best_peer"] == min(others, key=others.__getitem__), where
        elif kind == "ops":
            for row in document["rows"]:
                where = (stem, row["op"], row["case"], row["threads"])
                has = all(name in row["variants"] for name in rows.headline_peers(row))
                assert row["headline"] == (has and rows.OURS in row["variants"]), where
            # XNNPACK lowers everything: what lacks a peer has to be rare and is marked
            assert sum(not row["headline"] for row in document["rows"]) <= 0.05 * len(document["rows"])
        elif kind == "gpu":
            for found in document["cells"]:
                where = (stem, found["model"], found["batch"], found["dtype"])
                if gpu.OURS in found["graphs"] and "speedup_vs_best_peer" in found["graphs"][gpu.OURS]:
                    assert page_gpu.headline(found), where
    assert {"models", "ops", "pareto", "gpu", "arm"} <= seen


def test_the_front() -> None:
    points = _pareto()["points"]
    # mobilenetv2_100 is less accurate and slower than the enabled conv_small
    assert pareto.front(points) == {"conv_small", "conv_medium"}
    assert pareto.front([point | {"after_ms": None} for point in points]) == {p["model"] for p in points}
    assert [row[-1] for row in pareto.rows_of(_pareto())] == ["yes", "yes", ""]


@pytest.mark.skipif(_native.core is None, reason="no native library")
def test_pareto_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "timm", "skimage"):
        pytest.importorskip(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # set by the measurement, which runs in this process here
    monkeypatch.setenv("MNV4_OPS_STRICT", "0")
    monkeypatch.setattr(pareto.run, "run_cell", lambda task, request, *rest: task(request, lambda event: None))
    threads = torch.get_num_threads()
    few = [row for row in pareto.published.checkpoints() if row.short in ("conv_small", "mobilenetv3_small_100")]
    monkeypatch.setattr(pareto.published, "checkpoints", lambda *families: few)
    file = tmp_path / "pareto.json"
    arguments = ["pareto", "--resolution", "64", "--repeats", "1", "--seconds", "1", "--json", str(file)]
    result = runner.invoke(app, [*arguments, "--plot", str(tmp_path), "--markdown", str(tmp_path / "pareto.md")])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    v4, v3 = document["points"]
    assert v4["after_ms"] > 0
    assert v3["after_ms"] is None
    assert v3["before_ms"] == min(facts["median_ms"] for facts in v3["variants"].values())
    assert (tmp_path / "pareto.svg").is_file()
    assert "mobilenetv3_small_100" in (tmp_path / "pareto.md").read_text()


def test_pareto_families_are_checked() -> None:
    result = runner.invoke(app, ["pareto", "--family", "AlexNet"])
    assert result.exit_code == 2
    assert "'AlexNet'" in result.stderr


def _variants(scale: float = 1.0, ours: float = 1.0, width: float = 0.01) -> dict[str, Any]:
    medians = {"mnv4_ops": ours, "xnnpack": 1.2, "openvino": 1.5}
    return {
        name: {"median_ms": scale * ms, "q20_ms": scale * ms * (1 - width), "q80_ms": scale * ms * (1 + width)}
        for name, ms in medians.items()
    }


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (_variants(), "same"),
        (_variants(scale=1.5), "same"),  # another machine
        (_variants(ours=1.02), "same"),  # below the threshold
        (_variants(ours=1.1), "slower"),
        (_variants(ours=0.9), "faster"),
        (_variants(scale=0.5, ours=1.2), "slower"),
        (_variants(ours=1.1, width=0.2), "same"),  # noise
    ],
)
def test_changes_are_by_ratio_and_beyond_noise(new: Any, verdict: str) -> None:
    (change,) = compare.changes({"row": _variants()}, {"row": new, "more": new})
    assert change.verdict == verdict
    assert change.peers == ("xnnpack", "openvino")


def test_absolute_changes() -> None:
    (change,) = compare.changes({"row": _variants()}, {"row": _variants(scale=1.5)}, absolute=True)
    assert change.verdict == "slower"
    assert change.ratio == pytest.approx(1.5)


@needs_results
def test_compare_command(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    document = _ops()
    old.write_text(json.dumps(document))
    result = runner.invoke(app, ["compare", str(old), str(old), "--all"])
    assert result.exit_code == 0, result.output
    assert "3 rows in both: 0 slower, 0 faster, 3 same; geometric mean 1.000" in result.stdout
    for facts in (document["rows"][0]["variants"]["mnv4_ops"],):
        for key in ("median_ms", "q20_ms", "q80_ms"):
            facts[key] *= 1.4
    new.write_text(json.dumps(document))
    result = runner.invoke(app, ["compare", str(old), str(new), "--json", str(tmp_path / "c.json")])
    assert result.exit_code == 1
    assert "1 slower" in result.stdout
    assert {row["verdict"] for row in json.loads((tmp_path / "c.json").read_text())} == {"slower", "same"}
    for name in ("x86", "h100"):
        result = runner.invoke(app, ["compare", *[str(RESULTS / f"{name}.json")] * 2])
        assert result.exit_code == 0, result.output
    suite = {"benchmarks": [{"extra_info": row} for row in _ops()["rows"]]}
    new.write_text(json.dumps(suite))
    assert compare.read(new) == compare.read(old)
    for arguments, part in (
        ([str(old), str(RESULTS / "x86.json")], "no row is in both"),
        ([str(tmp_path / "none.json"), str(old)], "cannot be read"),
        ([str(RESULTS / "README.md"), str(old)], "expected a result file"),
        ([str(RESULTS / "arm.json"), str(old)], "expected results of"),
    ):
        result = runner.invoke(app, ["compare", *arguments])
        assert result.exit_code == 2
        assert part in result.stderr


def test_no_two_variants_look_alike() -> None:
    pytest.importorskip("matplotlib")
    names = [f"peer {index}" for index in range(20)]
    figure = page_plots.speedups("all", ["row"], [{"mnv4_ops": 1.0} | dict.fromkeys(names, 2.0)], {})
    spots = figure.axes[0].collections
    looks = {(spot.get_facecolor().tobytes(), spot.get_paths()[0].vertices.tobytes()) for spot in spots}
    assert len(spots) == len(looks) == len(names)
