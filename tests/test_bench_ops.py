"""Single ops of the benchmark: their cases, the gate, rows, the command, and that no suite rots."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mnv4_ops import _native
from mnv4_ops.bench import ceilings, gate, gpu_clock, op_run, ops, rows, timing
from mnv4_ops.bench import run as cpu_run
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.ops.base import enabled_call
from mnv4_ops.bench.peers import PEERS
from mnv4_ops.bench.peers.base import arguments_of
from mnv4_ops.cli import app
from mnv4_ops.spec import MODELS, FusedIBSpec, MQASpec, UIBSpec, ledger

ROOT = Path(__file__).resolve().parents[1]
runner = CliRunner()
needs_native = pytest.mark.skipif(_native.core is None, reason=f"no native library: {_native.reason}")
BANDWIDTH = {"L1": 400.0, "L2": 200.0, "L3": 100.0, "DRAM": 20.0}
LIMITS = ceilings.Ceilings(1, {"float32": 100.0}, BANDWIDTH, {"L1": 1000, "L2": 10_000, "L3": 10**6})


def test_every_file_is_an_op() -> None:
    files = {file.stem for file in Path(ops.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert {type(op).__module__.rsplit(".", 1)[1] for op in ops.OPS} == files
    assert len({op.name for op in ops.OPS}) == len(ops.OPS)


def test_a_new_file_is_a_new_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing.py").write_text(
        "from mnv4_ops.bench.ops.base import Op\nclass Nothing(Op):\n    name = label = 'nothing'\n"
        "    def specs(self, spec, h, w):\n        return iter(())\n"
    )
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    try:
        (found,) = (op for op in ops._found() if op.name == "nothing")
    finally:
        sys.modules.pop("mnv4_ops.bench.ops.nothing", None)
    assert found.cases(MODELS) == []


def test_ops_by_name() -> None:
    assert [op.name for op in ops.select(["ib", "depthwise", "ib"])] == ["ib", "depthwise"]
    assert ops.select(["all"]) == list(ops.OPS)
    with pytest.raises(BenchError, match=r"--ops: expected one of all, pointwise.*, got 'ibb'"):
        ops.select(["ibb"])


def test_cases_cover_every_block_of_the_ledger() -> None:
    places = {place for op in ops.OPS for case in op.cases(MODELS) for place in case.places}
    for entry in ledger():
        if isinstance(entry.spec, (UIBSpec, FusedIBSpec, MQASpec)):
            assert f"{entry.model} {entry.name}" in places
    kinds = {
        "extra_dw": "ExtraDW",
        "ib": "IB",
        "convnext": "ConvNext",
        "ffn": "FFN",
        "mqa": "MQA",
        "fused_ib": "FusedIB",
    }
    for name, kind in kinds.items():
        op = ops.by_name(name)
        counted = sum(op.macs(case) * len(case.places) for case in op.cases(["hybrid_medium"]))
        assert counted == sum(entry.macs for entry in ledger("hybrid_medium") if entry.spec.kind == kind)


def test_a_case_is_known_by_its_name() -> None:
    """`compare` and `--keep` tell rows apart by op and name."""
    for op in ops.OPS:
        cases = op.cases(MODELS)
        assert len({case.name for case in cases}) == len(cases), op.name
    names = {case.name for case in ops.by_name("head").cases(["conv_large", "hybrid_large"])}
    assert names == {"512-960-1280-1000 @12x12", "512-960-1280-1000 gelu @12x12"}


def test_single_convolutions_add_up_to_their_blocks() -> None:
    found: dict[str, int] = {}
    for name in ("pointwise", "depthwise", "dense"):
        op = ops.by_name(name)
        for case in op.cases(["conv_small"]):
            for place in case.places:
                found[place] = found.get(place, 0) + op.macs(case)
    for entry in ledger("conv_small"):
        # two equal layers of one block are one case
        if entry.spec.kind in ("ExtraDW", "IB", "ConvNext", "Conv3x3"):
            assert found[f"conv_small {entry.name}"] == entry.macs


def test_bytes_are_input_weights_and_output() -> None:
    op = ops.by_name("depthwise_pointwise")
    case = next(case for case in op.cases(["conv_small"]) if case.spec.depthwise.stride == 2)
    c_in, c_out = case.spec.channels
    kernel = case.spec.depthwise.kernel
    moved = c_in * case.height * case.width + c_out * case.height * case.width // 4
    assert op.bytes(case, 2, 4) == 4 * (2 * moved + c_in * kernel**2 + c_in * c_out)
    attention = ops.by_name("mqa_attention")
    (case, *_) = attention.cases(["hybrid_medium"])
    assert attention.bytes(case, 1, 4) == 4 * sum(x.numel() for x in attention.example(case, 1)) + 4 * 4 * 256 * 64


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_modules_are_in_eval_mode_throughout(op: ops.Op) -> None:
    """A converter that puts the mode of a module back would train its BatchNorms, for all peers after it."""
    case = op.tiny(op.cases(["conv_medium", "hybrid_large", "conv_small"])[0])
    assert not any(module.training for module in op.module(case).modules())


@needs_native
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_ours_is_right_in_every_op(op: ops.Op) -> None:
    threads = torch.get_num_threads()
    cases = op.cases(["conv_small", "conv_medium", "hybrid_large"])
    # the first and the last: relu and gelu, and stride 2 among them
    for batch, case in ((3, cases[0]), (1, cases[-1])):
        with torch.inference_mode():
            runs, left_out, errors = rows.prepare(op, op.tiny(case), rows.Setting(batch), ())
        assert set(runs) == {rows.OURS}, left_out
        assert errors[rows.OURS] <= 1
    torch.set_num_threads(threads)


@needs_native
def test_an_enabled_block_is_called_where_no_native_object_is() -> None:
    op = ops.by_name("ib")
    case = op.tiny(op.cases(["conv_small"])[0])
    module, x = op.module(case), op.example(case, 1)
    assert isinstance(x, torch.Tensor)
    with torch.inference_mode():
        assert gate.compare(enabled_call(module, x, 1)(), module(x)).error < gate.TOLERANCE


@pytest.mark.parametrize("name", ["torch_eager", "onnxruntime", "openvino", "xnnpack"])
def test_peers_of_several_inputs(name: str) -> None:
    (peer,) = (peer for peer in PEERS if peer.name == name)
    if peer.available() is not None:
        pytest.skip(str(peer.available()))
    op = ops.by_name("mqa_attention")
    case = op.tiny(op.cases(["hybrid_large"])[0])
    module, example = op.module(case), op.example(case, 2)
    with torch.inference_mode():
        assert gate.compare(peer.prepare(module, example, 1)(), module(*arguments_of(example))).error < gate.TOLERANCE


@needs_native
def test_a_wrong_answer_prints_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops.by_name("depthwise")
    case = op.tiny(op.cases(["conv_small"])[0])
    ours = type(op).ours
    monkeypatch.setattr(type(op), "ours", lambda *args: (lambda run: lambda: run() * 1.001)(ours(*args)))
    row = rows.measure(op, case, rows.Setting(), ("torch_eager",), repeats=1, seconds=0.1)
    assert "wrong answer" in row["red"]
    assert row["variants"] == {}
    assert not row["headline"]
    assert "red" in op_run.cells(row)[4].text


@needs_native
def test_a_dtype_without_kernels_is_red_with_its_reason() -> None:
    op = ops.by_name("ffn")
    row = rows.measure(op, op.tiny(op.cases(["conv_medium"])[0]), rows.Setting(dtype="float16"), (), repeats=1)
    assert row["red"] is None or "float16" in row["red"]


def _row(**median_ms: float) -> dict[str, Any]:
    setting = {"batch": 1, "threads": 1, "dtype": "float32", "device": "cpu"}
    variants = {name: {"median_ms": ms, "q20_ms": ms, "q80_ms": ms} for name, ms in median_ms.items()}
    row = {"op": "ib", "case": "x", "macs": 10**6, "bytes": 5000, "variants": variants, "unavailable": {}, "red": None}
    return rows.derive(row | setting, LIMITS)


def test_what_follows_from_the_times() -> None:
    row = _row(mnv4_ops=0.04, onnxruntime=0.06, openvino=0.05, xnnpack=0.08, torch_eager=0.5)
    assert row["limit_ms"] == pytest.approx(0.02)
    assert row["bound"] == "compute"
    assert row["variants"]["mnv4_ops"]["of_limit"] == pytest.approx(0.5)
    assert row["variants"]["mnv4_ops"]["gflops"] == pytest.approx(50)
    assert row["best_peer"] == "openvino"
    assert row["vs_best_peer"] == pytest.approx(1.25)
    assert row["headline"]
    document = {"rows": [row], "ceilings": [LIMITS.as_dict()]}
    assert "1.25x the best peer (geometric mean), 1 of 1 rows" in op_run.notes(document)[0]
    assert "no headline" not in "\n".join(op_run.notes(document))


@pytest.mark.parametrize("missing", rows.HEADLINE["cpu"])
def test_a_row_without_a_main_peer_is_no_headline(missing: str) -> None:
    times = dict.fromkeys(("mnv4_ops", "torch_eager", *rows.HEADLINE["cpu"]), 1.0)
    del times[missing]
    row = _row(**times)
    assert not row["headline"]
    assert op_run.cells(row)[-1].text == "1.00x *"
    assert op_run.cells(row)[-1].mood == "bad"


def test_plans_are_checked() -> None:
    plan = op_run.OpsPlan(["conv_small"], ["all"], [1], [1], ["float32"])
    plan.validate()
    assert not {"torch_compile", "torch_compile_cl", "torch_freeze_cl", "litert"} & set(plan.chosen())
    assert set(rows.HEADLINE["cpu"]) < set(plan.chosen())
    on_gpu = op_run.OpsPlan([], [], [], [], [], "cuda")
    assert set(on_gpu.chosen()) == {peer.name for peer in rows.peers_of("cuda")} - {"freeze_graph"}
    assert set(rows.HEADLINE["cuda"]) < {peer.name for peer in rows.peers_of("cuda")}
    assert "torch_compile" in op_run.OpsPlan([], [], [], [], [], peers="torch").chosen()
    more = op_run.OpsPlan([], [], [], [], [], peers="litert,all").chosen()
    assert more == ("litert", *plan.chosen())
    with pytest.raises(BenchError, match="--limit: does not go with --processes"):
        replace(plan, limit=10, processes=2).validate()
    with pytest.raises(BenchError, match="no peer 'cudnn_graph' for ops on cpu"):
        op_run.OpsPlan([], [], [], [], [], peers="cudnn_graph").chosen()


def test_cold_spans_flush_before_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Other:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch, "empty", lambda *args, **options: Other())
    monkeypatch.setattr(gpu_clock, "span", lambda run, count: (run(), float(count))[1])
    assert gpu_clock.cold_span(lambda: log.append("run"), 3) == 1.0
    assert log == ["flush", "run"] * 3


def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = rows._placed
    monkeypatch.setattr(rows, "_placed", lambda thing, setting: placed(thing, replace(setting, device="cpu")))


def test_the_reference_has_the_rounded_parameters_on_the_device() -> None:
    module = torch.nn.Conv2d(3, 4, 1).eval()
    x = torch.randn(1, 3, 5, 5)
    with torch.inference_mode():
        judge = rows._Gate(module, x, rows.Setting(dtype="bfloat16"))
        expected = copy.deepcopy(module).bfloat16().double()(x.bfloat16().double())
        assert torch.equal(judge.truth, expected)
        assert not torch.equal(judge.truth, copy.deepcopy(module).double()(x.bfloat16().double()))
        # everything that the gate computes is where the row is
        judge = rows._Gate(module, x, rows.Setting(dtype="bfloat16", device="meta"))
    assert judge.truth.device.type == judge.plain.device.type == "meta"


@needs_native
def test_a_row_of_a_gpu_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the device: every captured peer, the 2x rule, both states of the L2."""
    _on_the_host(monkeypatch)
    monkeypatch.setattr(rows, "_captured", lambda run: run)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spans: list[str] = []

    def interleave(runs: Any, *, span: Any = gpu_clock.span, **options: Any) -> Any:
        spans.append(span.__name__)
        return {name: timing.Stats.of([1e-3 * (1 + i), 2e-3]) for i, name in enumerate(reversed(runs))}

    monkeypatch.setattr(gpu_clock, "interleave", interleave)
    op = ops.by_name("convnext")
    monkeypatch.setattr(type(op), "refuses", lambda *args: None)
    setting = rows.Setting(2, 1, "float32", "cuda")
    chosen = ("cudnn_graph", "native_dw_graph", "compile_graph", "tensorrt_graph")
    row = rows.measure(op, op.tiny(op.cases(["conv_small"])[0]), setting, chosen, ceilings=LIMITS)
    assert spans == ["span", "cold_span"]
    assert row["red"] is None
    assert set(row["unavailable"]) <= {"tensorrt_graph", "native_dw_graph"}
    assert row["variants"]["mnv4_ops"]["of_allowed"] <= 1
    assert row["variants"]["mnv4_ops"]["cold_median_ms"] > 0
    assert row["headline"]
    assert row["best_peer"] == "compile_graph"


def test_the_middle_of_several_processes() -> None:
    found = [{"red": None, "vs_best_peer": ratio} for ratio in (1.3, 0.9, 1.1)]
    assert cpu_run.middle(found, "vs_best_peer") == {
        "red": None, "vs_best_peer": 1.1, "speedups_of_processes": [0.9, 1.1, 1.3]
    }  # fmt: skip
    assert cpu_run.middle(found[:1], "vs_best_peer") == found[0]
    assert cpu_run.middle([*found, {"red": "wrong"}], "vs_best_peer") == {"red": "wrong"}


@needs_native
def test_the_command(tmp_path: Path) -> None:
    file, text = tmp_path / "ops.json", tmp_path / "ops.md"
    arguments = [
        "bench",
        "--ops",
        "ib",
        "--model",
        "conv_small",
        "--resolution",
        "64",
        "--threads",
        "1",
        "--repeats",
        "1",
    ]
    arguments += ["--peers", "torch_eager", "--seconds", "1", "--json", str(file), "--markdown", str(text)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text())
    assert document["schema"] == op_run.SCHEMA
    assert {"date", "commit", "packages", "cpu", "cpus"} <= set(document["environment"])
    (limits,) = document["ceilings"]
    assert set(limits["bandwidth_gbs"]) == set(ceilings.LEVELS)
    assert len(document["rows"]) == len(ops.by_name("ib").cases(["conv_small"], 64))
    for row in document["rows"]:
        assert row["op"] == "ib"
        assert row["threads"] == 1
        assert set(row["variants"]) == {"mnv4_ops", "torch_eager"}
        assert row["limit_ms"] > 0
        assert row["vs_best_peer"] > 0
        assert row["headline"] is False
    assert "UIB IB" in result.stdout
    assert "### UIB IB" in text.read_text()


@needs_native
def test_a_sitting_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--limit: what a sitting had no time for is named, and what the file lacks comes first in the next."""
    file = tmp_path / "ops.json"
    arguments = ["bench", "--ops", "ib,convnext", "--model", "conv_small", "--resolution", "64", "--threads", "1"]
    arguments += ["--repeats", "1", "--seconds", "1", "--peers", "torch_eager", "--keep", "--json", str(file)]
    arguments += ["--markdown", str(tmp_path / "ops.md"), "--limit", "60"]
    total = sum(len(ops.by_name(name).cases(["conv_small"], 64)) for name in ("ib", "convnext"))
    seen: list[int] = []

    def here(task: Any, request: Any, *rest: Any, on_event: Any = None) -> Any:
        def notify(event: dict[str, Any]) -> None:
            on_event(event)
            if event["stage"] == "row":
                # on disk as soon as it is known
                seen.append(len(json.loads(file.read_text())["rows"]))
                clock.append(40.0)

        return task(request, notify)

    clock: list[float] = []
    monkeypatch.setattr(cpu_run, "run_cell", here)
    monkeypatch.setattr(op_run.time, "time", lambda: sum(clock))
    monkeypatch.setattr(ceilings, "measure", lambda threads, precisions=(): LIMITS)
    threads = torch.get_num_threads()
    for sitting in range(1, total // 2 + 1):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        document = json.loads(file.read_text())
        assert len(document["rows"]) == 2 * sitting
        assert len(document.get("not_measured", [])) == total - 2 * sitting
        assert ("no time for" in (tmp_path / "ops.md").read_text()) == (2 * sitting < total)
    torch.set_num_threads(threads)
    assert seen == sorted(seen)
    assert len({op_run.key(row) for row in document["rows"]}) == len(document["rows"])


def test_footnotes_say_which_rows_lack_a_peer() -> None:
    found = [_row(mnv4_ops=0.1, xnnpack=0.2) for _ in range(3)]
    found[0]["unavailable"] = {"litert": f"{gate.WRONG}: 7 of the allowed error", "ncnn": "not installed"}
    found[1] |= {
        "op": "mqa",
        "unavailable": {"litert": f"{gate.WRONG}: 9 of the allowed error", "ncnn": "not installed"},
    }
    found[2]["unavailable"] = {"ncnn": "not installed"}
    assert op_run.notes({"rows": found, "ceilings": []})[-2:] == [
        "left out: litert in 2 of 3 rows (UIB IB, Mobile MQA block): wrong answer: 7 of the allowed error",
        "left out: ncnn in 3 of 3 rows: not installed",
    ]


def test_every_peer_has_its_column() -> None:
    document = {"rows": [_row(mnv4_ops=0.1, xnnpack=0.2, litert=0.1), _row(mnv4_ops=0.1, xnnpack=0.8)]}
    columns, (ib,) = op_run.against_peers(document, {"litert": "LiteRT"})
    assert columns == ("op", "rows", "LiteRT", "xnnpack")
    assert [cell.text for cell in ib] == ["UIB IB", "2", "1.00x (1 of 2)", "4.00x"]
    document["rows"].append(document["rows"][1] | {"op": "head"})
    *_, everything = op_run.against_peers(document)[1]
    # threads are told apart
    document["rows"].append(document["rows"][1] | {"threads": 2})
    assert [row[0].text for row in op_run.against_peers(document)[1]] == [
        "UIB IB, 1 thread", "UIB IB, 2 threads", "head: 1x1, pool, 1x1, classifier, 1 thread", "all"
    ]  # fmt: skip
    assert [cell.text for cell in everything] == ["all", "3", "1.00x (1 of 3)", "5.04x"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--ops", "ibb"], ["--ops", "'ibb'", "depthwise"]),
        (["--ops", ","], ["--ops", "at least one"]),
        (["--ops", "ib", "--blocks"], ["--ops", "--blocks"]),
        (["--ops", "ib", "--model", "conv_smal"], ["--model", "'conv_smal'"]),
        (["--ops", "ib", "--peers", "abacus"], ["--peers", "'abacus'"]),
        (["--ops", "ib", "--threads", "4096"], ["--threads", "4096"]),
    ],
    ids=lambda value: " ".join(value) if value[0] == "--ops" else None,
)
def test_errors_are_one_line_and_status_2(arguments: list[str], parts: list[str]) -> None:
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert all(part in line for part in parts), line


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs a checkout")
def test_no_suite_rots(tmp_path: Path) -> None:
    """Every pytest-benchmark suite once, at tiny sizes."""
    pytest.importorskip("timm")
    pytest.importorskip("skimage")
    # not in the checkout: there is no native library beside the sources
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "--smoke", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--benchmark-json", str(tmp_path / "smoke.json")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    document = json.loads((tmp_path / "smoke.json").read_text())
    assert {"commit", "packages", "cpu"} <= set(document["environment"])
    found = document["benchmarks"]
    assert {bench["extra_info"]["op"] for bench in found} == {"model", *(op.name for op in ops.OPS)}
    for bench in found:
        assert "mnv4_ops" in bench["extra_info"]["variants"]
        assert len(bench["extra_info"]["variants"]) > 1


@needs_native
@pytest.mark.parametrize("name", ["ib", "depthwise_pointwise"])
def test_slow_peers_pass_the_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that `all` leaves out, torch.jit and ncnn: in a row they meet parameters like a user's."""
    resets: list[int] = []
    reset = torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: (resets.append(1), reset()))
    threads = torch.get_num_threads()
    op, chosen = ops.by_name(name), ("torch_compile", "torch_jit_cl", "litert", "ncnn")
    case = op.tiny(op.cases(["conv_small"])[0])
    with torch.inference_mode():
        runs, left_out, _ = rows.prepare(op, case, rows.Setting(), chosen)
        # else the ninth row of a class would be one too many for torch.compile
        assert resets or "torch._dynamo" not in sys.modules
        rows.prepare(op, case, rows.Setting(), ())
    torch.set_num_threads(threads)
    assert resets
    assert {"mnv4_ops", "torch_compile", "torch_jit_cl"} <= set(runs)
    assert all("not installed" in reason for reason in left_out.values()), left_out
