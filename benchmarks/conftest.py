"""Options and fixtures of the benchmark suites.

    pytest benchmarks                 everything that is installed
    pytest benchmarks --smoke         tiny sizes, one round: nothing rots (CI)

For headline numbers use `mnv4-ops bench`, which interleaves the variants; these suites time one after the other and
are for `pytest-benchmark compare` between two commits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="tiny sizes and one round, no figures of any worth")
    parser.addoption("--bench-threads", type=int, default=1, help="threads of every variant")


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(scope="session")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    threads = int(request.config.getoption("--bench-threads"))
    torch.set_num_threads(threads)
    yield threads
    torch.set_num_threads(before)


@pytest.fixture
def clock(benchmark: Any, smoke: bool) -> Callable[[Callable[[], Any]], None]:
    """Times a callable: medians of 20 rounds, one in a smoke run."""

    def measure(run: Callable[[], Any]) -> None:
        with torch.inference_mode():
            if smoke:
                benchmark.pedantic(run, rounds=1, iterations=1)
            else:
                benchmark.pedantic(run, rounds=20, iterations=5, warmup_rounds=3)

    return measure
