"""How much the tests by hypothesis try: a corpus that always runs, and some examples or, on request, very many."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, settings

EXAMPLES = int(os.environ.get("MNV4_OPS_FUZZ", "0"))
# the fixtures hold for all examples of a test; hypothesis derandomizes by itself where CI is set
fuzz = settings(
    max_examples=EXAMPLES or 70,
    deadline=None,
    derandomize=False if EXAMPLES else settings.default.derandomize,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def corpus(name: str) -> Callable[[Any], Any]:
    """Adds the cases of `corpus/<name>.json`, keywords of the test each. To be set above the other decorators."""
    cases: list[dict[str, Any]] = json.loads((Path(__file__).parent / "corpus" / f"{name}.json").read_text())

    def add(test: Any) -> Any:
        for case in cases:
            test = example(**case)(test)
        return test

    return add
