"""The roofline reproduces the paper's formula: counted sums, shares, bounds; the command and its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mnv4_ops.bench import ceilings, layers, plots, published, roofline, roofline_plot, roofline_report
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.cli import app
from mnv4_ops.spec import MODELS, VARIANTS, head_spec, ledger

runner = CliRunner()

RIDGES = (0, 31.2, 39.7, 100, 347.3, 433.8, 500)
# counted independently with forward hooks on timm's models: unfused, one byte an element, G-MAC-equivalents
COUNTED = {
    "conv_small": (0.186, 0.300, 0.346, 0.780, 2.703, 3.376, 3.891),
    "conv_medium": (1.080, 1.313, 1.396, 2.537, 8.662, 10.820, 12.471),
    "conv_large": (6.376, 7.051, 7.299, 9.286, 30.341, 37.898, 43.681),
    "hybrid_medium": (1.271, 1.519, 1.610, 2.937, 10.051, 12.554, 14.470),
    "hybrid_large": (7.712, 8.423, 8.685, 10.851, 35.342, 44.145, 50.881),
}
# per cent of that time in memory-bound layers at 31.2 and 100
MEMORY_SHARE = {"conv_small": (46, 97), "conv_medium": (22, 94), "conv_large": (12, 38)}


@pytest.mark.parametrize("model", MODELS)
def test_costs_are_the_counted_ones(model: str) -> None:
    rows = roofline.blocks(model)
    assert [round(roofline.cost(rows, ridge) / 1e9, 3) for ridge in RIDGES] == list(COUNTED[model])
    assert roofline.cost(rows, 0) == sum(entry.macs for entry in ledger(model))


@pytest.mark.parametrize("model", MEMORY_SHARE)
def test_memory_bound_shares_are_the_counted_ones(model: str) -> None:
    rows = roofline.blocks(model)
    assert tuple(round(100 * roofline.memory_share(rows, ridge)) for ridge in (31.2, 100)) == MEMORY_SHARE[model]
    assert roofline.memory_share(rows, 347.3) == pytest.approx(1)


@pytest.mark.parametrize("model", MODELS)
def test_shares_of_kinds_are_the_counted_ones(model: str) -> None:
    found = [layer for row in roofline.blocks(model) for layer in row.layers]
    total = {ridge: sum(roofline.layer_cost(layer, ridge) for layer in found) for ridge in (0, 31.2, 433.8)}

    def share(kind: str, ridge: float) -> float:
        return sum(roofline.layer_cost(layer, ridge) for layer in found if layer.kind == kind) / total[ridge]

    if model == "conv_small":
        assert round(share("fc", 31.2), 2) == 0.26
        assert round(share("fc", 433.8), 2) == 0.32
    # of all models, in per cent: 2 to 4, 9 to 14, 14.5 to 27
    assert 0.02 <= share("depthwise", 0) <= 0.04
    assert 0.09 <= share("depthwise", 31.2) <= 0.145
    assert 0.144 <= share("depthwise", 433.8) <= 0.275


@pytest.mark.parametrize("model", [*MODELS, *VARIANTS])
def test_layers_add_up_to_the_ledger(model: str) -> None:
    for entry in ledger(model, 96):
        found = layers.of_spec(entry.spec, entry.height, entry.width)
        assert sum(layer.macs for layer in found) == entry.macs
        assert sum(layer.weights for layer in found) == entry.spec.weights()
        if found:
            c_in, c_out = entry.spec.channels
            h, w = entry.out_hw
            assert found[0].reads == c_in * entry.height * entry.width
            assert found[-1].writes == c_out * h * w


@pytest.mark.parametrize("model", ["conv_small", "conv_medium"])
def test_a_traced_model_has_the_layers_of_the_ledger(model: str) -> None:
    timm = pytest.importorskip("timm")
    traced = layers.of_module(timm.create_model(f"mobilenetv4_{model}"), 96)
    assert traced == tuple(layer for row in roofline.blocks(model, 96) for layer in row.layers)


def test_a_head_is_one_block() -> None:
    spec = head_spec("conv_small")
    found = layers.of_spec(spec, 7, 7)
    assert [layer.kind for layer in found] == ["pointwise", "fc", "fc"]
    assert sum(layer.macs for layer in found) == spec.macs(7, 7)


def test_fusing_moves_less_and_bounds_switch_at_the_intensity() -> None:
    for row in roofline.blocks("hybrid_medium"):
        assert row.bytes(fused=True) <= row.bytes(fused=False)
        for ridge in RIDGES:
            assert row.cost(ridge, fused=True) <= row.cost(ridge, fused=False)
        turn = row.intensity(fused=True)
        assert row.bound(0.999 * turn, fused=True) == "compute"
        assert row.bound(1.001 * turn, fused=True) == "memory"
        assert row.bound(0, fused=False) == "compute"
        assert row.bound(1e6, fused=False) == "memory"
    extra = next(row for row in roofline.blocks("conv_medium") if row.name == "2.1")
    # its 1x1 layers have 68 MACs a byte each, its depthwise layers 2 to 5
    assert extra.bound(31.2, fused=False).startswith("memory ")


def test_batch_and_itemsize() -> None:
    (row,) = (row for row in roofline.blocks("conv_medium") if row.name == "3.4")
    eight_images = roofline.Scale(batch=8)
    one, eight = row.bytes(fused=True), row.bytes(fused=True, scale=eight_images)
    assert eight - one == 7 * (row.layers[0].reads + row.layers[-1].writes)
    assert row.bytes(fused=True, scale=roofline.Scale(itemsize=4)) == 4 * one
    assert row.cost(0, fused=True, scale=eight_images) == 8 * row.macs
    assert row.intensity(fused=True, scale=eight_images) > row.intensity(fused=True)


def test_v4_is_on_the_pareto_front_at_every_ridge_point() -> None:
    pytest.importorskip("timm")
    generations = roofline.generations()
    assert {model.family for model in generations} == set(roofline.GENERATIONS)
    for ridge in RIDGES:
        relative = roofline.relative_to_best(generations, ridge)
        assert min(relative.values()) == 1
        assert all(relative[name] == 1 for name in MODELS), (ridge, relative)
        assert relative["mobilenetv2_100"] > 1.5


def test_published_accuracies() -> None:
    rows = published.checkpoints()
    assert len({row.checkpoint for row in rows}) == len(rows)
    assert all(50 < row.top1 < row.top5 < 100 and row.source for row in rows)
    assert {row.short for row in published.checkpoints("MobileNetV4")} == set(MODELS)
    assert set(published.paper()) == set(MODELS)
    timm = pytest.importorskip("timm")
    assert all(timm.is_model(row.model) for row in rows)


@pytest.mark.parametrize("text", ["-1", "500.5", "nan", "pixel9", ""])
def test_ridge_points_are_checked(text: str) -> None:
    with pytest.raises(BenchError, match="--ridge: expected a number from 0 to 500"):
        roofline.ridge_point(text)


def test_ridge_points_by_name() -> None:
    fitted = {"pixel6-cpu": 31.2, "s23-cpu": 39.7, "pixel4-dsp": 347.3, "pixel8-edgetpu": 433.8}
    assert {name: roofline.ridge_point(name)[1] for name in fitted} == fitted
    assert roofline.ridge_point("machine", 7.25) == ("this machine (7.2)", 7.25)


def test_ceilings_give_the_limit_of_a_call() -> None:
    bandwidth = {"L1": 400.0, "L2": 200.0, "L3": 100.0, "DRAM": 20.0}
    found = ceilings.Ceilings(1, {"float32": 100.0}, bandwidth, {"L1": 1000, "L2": 10_000, "L3": 100_000})
    assert [found.level(size) for size in (1000, 1001, 100_000, 100_001)] == ["L1", "L2", "L3", "DRAM"]
    assert found.ridge() == 2.5
    assert found.limit_ms(10**6, 1000) == (2e6 / 100 / 1e6, "compute")
    assert found.limit_ms(1, 200_000) == (200_000 / 20 / 1e6, "DRAM")
    assert found.limit_ms(1, 1, "float16") is None


def test_bandwidth_is_measured() -> None:
    assert ceilings.copy_bandwidth(12 * 2**10, threads=1, seconds=0.01) > 0.1
    capacity = ceilings.capacities(2)
    assert 0 < capacity["L1"] < capacity["L2"] <= capacity["L3"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("timm")
    bandwidth = dict.fromkeys(ceilings.LEVELS, 50.0)
    measured = ceilings.Ceilings(1, {"float32": 500.0}, bandwidth, {"L1": 1, "L2": 2, "L3": 3})
    monkeypatch.setattr(ceilings, "measure", lambda *args, **kwargs: measured)
    arguments = ["roofline", "--model", "conv_small", "--ridge", "pixel6-cpu,machine", "--sweep"]
    arguments += ["--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "figures")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "ExtraDW" in result.stdout
    assert "mobilenetv3_large_100" in result.stdout
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["schema"] == roofline_report.SCHEMA
    (model,) = document["models"]
    points: list[dict[str, Any]] = model["ridges"]
    assert [point["ridge"] for point in points] == [31.2, 5.0]
    assert round(points[0]["cost"] / 1e9, 3) == 0.300
    assert points[0]["cost"] == pytest.approx(sum(row["cost"] for row in points[0]["blocks"]))
    assert len(points[0]["blocks"]) == len(model["blocks"])
    assert len(document["sweep"]) == len(published.checkpoints(*roofline.GENERATIONS))
    names = ("roofline_conv_small", "roofline_conv_small_blocks", "roofline_generations")
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "figures" / f"{name}.svg").read_text()


@pytest.mark.parametrize("kind", plots.FORMATS)
def test_figures_are_the_same_bytes_on_every_run(kind: str) -> None:
    pytest.importorskip("matplotlib")
    rows = roofline.blocks("conv_small", 96)
    first, second = (plots.render(roofline_plot.model_curve("conv_small", rows), kind) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "conv_smal"], ["--model", "conv_small", "'conv_smal'"]),
        (["--model", ","], ["--model", "at least one"]),
        (["--ridge", "501"], ["--ridge", "'501'", "pixel6-cpu"]),
        (["--ridge", ","], ["--ridge", "at least one"]),
        (["--bytes", "0"], ["--bytes", "'0'"]),
        (["--batch", "x"], ["--batch", "'x'"]),
        (["--json", "."], ["--json", "folder"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_errors_are_one_line_and_status_2(arguments: list[str], parts: list[str]) -> None:
    result = runner.invoke(app, ["roofline", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("mnv4-ops: error: ")
    assert all(part in line for part in parts), line
