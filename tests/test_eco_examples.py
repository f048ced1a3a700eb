"""The examples run as their texts say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mnv4_ops import _native

pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = [f"{i}.png" for i in range(7)]


@pytest.mark.slow
def test_torchrun_over_a_folder_loses_no_image(tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "output"
    images.mkdir()
    output.mkdir()
    for i, name in enumerate(NAMES):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    # what a worker leaves that was killed: a finished image and half a line
    (output / "rank-1.tsv").write_text("3.png\t7\t0.5000\n5.png\t1")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(EXAMPLES / "folder_torchrun.py"), str(images), str(output)]
    options = ["--model", "mobilenetv4_conv_small_035", "--random-weights", "--batch", "2"]
    done = subprocess.run([*run, *script, *options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for path in sorted(output.glob("*.tsv")) for line in path.read_text().splitlines()]
    names = sorted(fields[0] for fields in lines if len(fields) == 3)
    assert names == sorted(NAMES)
    assert ["3.png", "7", "0.5000"] in lines
