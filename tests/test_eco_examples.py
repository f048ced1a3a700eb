"""The examples run as their texts say, and lose no image when a worker is killed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnv4_ops import _native

pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")
pytestmark = [pytest.mark.skipif(_native.core is None, reason="no native library"), pytest.mark.slow]
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = [f"{i}.png" for i in range(9)]
OPTIONS = ["--model", "mobilenetv4_conv_small_035", "--random-weights", "--batch", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def run(command: list[Any], cwd: Path, **environment: str) -> None:
    # beside the source of the package lies no library
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "PYTHONSAFEPATH": "1", **environment}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# kills the process of rank 1 in the middle of its work, once
KILLED_RANK = """
import os, signal, sys, pathlib
import folder_torchrun, timm
mark = pathlib.Path(sys.argv.pop(1))
create = timm.create_model

def create_model(*args, **options):
    model = create(*args, **options)
    calls = []
    def count(module, args):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    model.register_forward_pre_hook(count)
    return model

timm.create_model = create_model
folder_torchrun.main()
"""


def test_torchrun_over_a_folder_loses_no_image(images: Path, tmp_path: Path) -> None:
    """One rank is killed in its second batch; torchrun starts all of them again."""
    output, mark = tmp_path / "output", tmp_path / "killed"
    output.mkdir()
    # what an earlier worker left: a finished image and half a line
    (output / "rank-1.tsv").write_text("3.png\t7\t0.5000\n5.png\t1")
    (tmp_path / "killed_rank.py").write_text(KILLED_RANK)
    run([*TORCHRUN, "--max-restarts", 1, tmp_path / "killed_rank.py", mark, images, output, *OPTIONS], tmp_path)
    assert mark.exists()
    lines = [line.split("\t") for path in sorted(output.glob("*.tsv")) for line in path.read_text().splitlines()]
    # the half line and what was cut off by the kill have no three fields
    names = sorted(fields[0] for fields in lines if len(fields) == 3)
    assert names == sorted(NAMES)
    assert ["3.png", "7", "0.5000"] in lines


# kills the process of the first actor that is called a second time, once
KILLED_ACTOR = """
import os, pathlib, signal, sys
import folder_ray
mark = pathlib.Path(sys.argv.pop(1))

class Killed(folder_ray.Classify):
    calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)

args = folder_ray.arguments()
folder_ray.run(args.images, args.output, args, Killed)
"""


def test_ray_over_a_folder_loses_no_image(images: Path, tmp_path: Path) -> None:
    """An actor is killed in its second batch; Ray starts it again."""
    pytest.importorskip("ray.data", reason="waits for pip install 'ray[data]'")
    output, mark = tmp_path / "output", tmp_path / "killed"
    (tmp_path / "killed_actor.py").write_text(KILLED_ACTOR)
    run(
        [sys.executable, tmp_path / "killed_actor.py", mark, images, output, *OPTIONS, "--workers", 2],
        tmp_path, RAY_USAGE_STATS_ENABLED="0",
    )  # fmt: skip
    assert mark.exists()
    rows = [row for path in output.glob("*.csv") for row in csv.DictReader(path.open())]
    assert sorted(row["name"] for row in rows) == sorted(NAMES)
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
