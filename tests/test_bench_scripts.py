"""The scripts of `benchmarks/` at sizes that show only that they run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnv4_ops import _native
from mnv4_ops.bench import op_run, pareto

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
COMMAND = Path(sys.executable).with_name("mnv4-ops")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_native.core is None, reason=f"no native library: {_native.reason}"),
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs a checkout"),
]


def _run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_the_comparison_of_attention_blocks(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    options = ("--threads", "1", "--resolution", "64", "--repeats", "1", "--seconds", "1")
    text = _run(sys.executable, FOLDER / "attention.py", *options, cwd=tmp_path)
    for variant in ("base", "+3 MHSA", "+3 MQA", "+3 MQA, K/V /2", "+3 MQA for MHSA"):
        assert f"│ {variant} " in text


@pytest.mark.skipif(shutil.which("bash") is None or not COMMAND.is_file(), reason="waits for bash and the command")
def test_the_tables_of_x86(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("skimage")
    variables = {"SMOKE": "1", "RESULTS": str(tmp_path), "NAME": "here", "PEERS": "torch_eager", "HF_HUB_OFFLINE": "1"}
    _run("bash", FOLDER / "x86.sh", COMMAND, "ib-1", "MobileNetV3", cwd=tmp_path, MODELS="conv_small", **variables)
    table = json.loads((tmp_path / "here_ops.json").read_text())
    assert table["schema"] == op_run.SCHEMA
    assert {(row["op"], row["threads"]) for row in table["rows"]} == {("ib", 1)}
    front = json.loads((tmp_path / "here_pareto.json").read_text())
    assert front["schema"] == pareto.SCHEMA
    assert {point["family"] for point in front["points"]} == {"MobileNetV3"}
    assert {file.name for file in tmp_path.glob("*.md")} == {"here_ops.md", "here_pareto.md"}
