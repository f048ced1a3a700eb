"""Options and fixtures of the benchmark suites.

    pytest benchmarks                                    float32, batch 1, 1 thread, this CPU
    pytest benchmarks --bench-threads 1,2 --bench-batch 1,8 --bench-models conv_small --bench-ops depthwise,ib
    pytest benchmarks --smoke                            tiny sizes, one round: nothing rots (CI)

One test is one row: the gate, then our call timed by pytest-benchmark with the peers' turns between its rounds, in a
process pinned to as many CPUs as threads. What the peers took is in `extra_info`, in the form of `mnv4-ops bench
--ops`, which is also what writes the committed tables.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from mnv4_ops.bench import machine, op_run, rows, timing
from mnv4_ops.bench import ops as registry
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.roofline_report import models_of

_ROUNDS_PER_TURN = 4
_SMOKE_PEERS = ("torch_eager", "onnxruntime", "openvino", "xnnpack")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mnv4_ops benchmarks (lists with commas)")
    group.addoption("--smoke", action="store_true", help="tiny sizes and one round, no figures of any worth")
    group.addoption("--bench-threads", default="1", help="threads of every variant, e.g. 1,2")
    group.addoption("--bench-batch", default="1", help="batch sizes, e.g. 1,8")
    group.addoption("--bench-dtype", default="float32", help="float32, bfloat16, float16")
    group.addoption("--bench-device", default="cpu", help="cpu or cuda")
    group.addoption("--bench-models", default="all", help="whose blocks: conv_small ... hybrid_large, all-conv, all")
    group.addoption("--bench-ops", default="all", help="pointwise, depthwise, ... (see mnv4_ops/bench/ops)")
    group.addoption("--bench-peers", default="all", help="names as in `mnv4-ops info`; all: but those slow to prepare")


def words(config: pytest.Config, name: str) -> list[str]:
    return [word for word in str(config.getoption(name)).split(",") if word]


def settings(config: pytest.Config) -> list[rows.Setting]:
    """The product of the options."""
    return [
        rows.Setting(int(batch), int(threads), dtype, str(config.getoption("--bench-device")))
        for threads in words(config, "--bench-threads")
        for dtype in words(config, "--bench-dtype")
        for batch in words(config, "--bench-batch")
    ]


def peers_of(config: pytest.Config) -> tuple[str, ...]:
    if config.getoption("--smoke") and config.getoption("--bench-peers") == "all":
        return _SMOKE_PEERS
    plan = op_run.OpsPlan(
        [], [], [], [], [], str(config.getoption("--bench-device")), config.getoption("--bench-peers")
    )
    return plan.chosen()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    try:
        if "setting" in metafunc.fixturenames:
            found = settings(config)
            ids = [f"{s.device}-{s.dtype}-batch{s.batch}-threads{s.threads}" for s in found]
            metafunc.parametrize("setting", found, ids=ids)
        if "case" in metafunc.fixturenames:
            models = models_of(words(config, "--bench-models"))
            cases = [case for op in registry.select(words(config, "--bench-ops")) for case in op.cases(models)]
            if config.getoption("--smoke"):
                # one of each op
                cases = list({case.op: registry.by_name(case.op).tiny(case) for case in cases}.values())
            metafunc.parametrize("case", cases, ids=[f"{case.op} {case.name}" for case in cases])
        if "model_name" in metafunc.fixturenames:
            models = models_of(words(config, "--bench-models"))
            metafunc.parametrize("model_name", models[:1] if config.getoption("--smoke") else models)
    except BenchError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


@pytest.fixture
def peers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return peers_of(request.config)


@pytest.fixture
def pinned(setting: rows.Setting) -> Iterator[None]:
    """As many CPUs and threads as the row says."""
    before = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    with machine.pinned(machine.pick_cpus(setting.threads)):
        yield
    torch.set_num_threads(before)


Clock = Callable[[Mapping[str, Callable[[], Any]], str], dict[str, dict[str, Any]]]


@pytest.fixture
def clock(benchmark: Any, smoke: bool) -> Clock:
    """Times one variant by pytest-benchmark and the others between its rounds; statistics of all of them."""

    def measure(runs: Mapping[str, Callable[[], Any]], ours: str) -> dict[str, dict[str, Any]]:
        others = [name for name in runs if name != ours]
        samples: dict[str, list[float]] = {name: [] for name in others}
        generator, done = random.Random(0), 0

        def turns() -> None:
            nonlocal done
            done += 1
            if (done - 1) % _ROUNDS_PER_TURN:
                return
            generator.shuffle(others)
            for name in others:
                if not smoke:
                    timing.settle()
                runs[name]()
                for _ in range(1 if smoke else _ROUNDS_PER_TURN):
                    start = time.perf_counter()
                    runs[name]()
                    samples[name].append(time.perf_counter() - start)
            if not smoke:
                timing.settle()
            runs[ours]()

        with torch.inference_mode():
            benchmark.pedantic(runs[ours], setup=turns, rounds=1 if smoke else 15 * _ROUNDS_PER_TURN, iterations=1)
        samples[ours] = list(benchmark.stats.stats.data)
        return {name: timing.Stats.of(values).as_dict() for name, values in samples.items()}

    return measure


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Versions, CPU, tier and commit beside what pytest-benchmark says of the machine."""
    output_json["environment"] = machine.environment()


def pytest_configure(config: pytest.Config) -> None:
    # a compiler's pool beside a measurement would take its cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
