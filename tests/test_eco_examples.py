"""The examples run as their texts say, and lose no image when a worker is killed."""

from __future__ import annotations

import base64
import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def environment(**options: str) -> dict[str, str]:
    # without the folder that pytest runs in: beside the source of the package lies no library
    return {**os.environ, "PYTHONPATH": str(EXAMPLES), "PYTHONSAFEPATH": "1", **options}


def run(command: list[Any], cwd: Path, **options: str) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**options),
        capture_output=True,
        text=True,
        timeout=500,
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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Its address on the loopback."""
    pytest.importorskip("litserve", reason="waits for pip install litserve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "serve_litserve.py"), *OPTIONS[:3], "--batch", "4", "--wait", "0.05"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=tmp_path, env=environment(), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 200
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).read()
                    break
                except OSError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.2)
            yield address
        finally:
            # its workers with it
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_a_server_answers_under_load(server: str, images: Path) -> None:
    """48 requests from 8 clients: each gets its own answer, and some share a call of the model."""
    spec = importlib.util.spec_from_file_location("serve_litserve", EXAMPLES / "serve_litserve.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    api = example.Classifier(OPTIONS[1], False, 1, max_batch_size=4)
    requests = [{"image": base64.b64encode((images / name).read_bytes()).decode()} for name in NAMES]
    api.device = "cpu"
    api.setup("cpu")
    wants = [api.predict(api.decode_request(request)[None])[0] for request in requests]

    def ask(i: int) -> dict[str, Any]:
        body = json.dumps(requests[i % len(requests)]).encode()
        request = urllib.request.Request(f"{server}/predict", body, {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(48)))
    for i, answer in enumerate(answers):
        want = wants[i % len(wants)]
        assert answer["class"] == want["class"]
        assert answer["probability"] == pytest.approx(want["probability"], abs=1e-5)
    assert max(answer["batch"] for answer in answers) > 1
    assert max(answer["batch"] for answer in answers) <= 4
