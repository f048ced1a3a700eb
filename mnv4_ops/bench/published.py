"""Published accuracies (`data/accuracy.json`): nothing in there was measured by this project."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Checkpoint:
    """A timm checkpoint: `top1`, `top5` in percent on ImageNet-1k at `resolution` pixels a side, parameters in
    millions.
    """

    checkpoint: str
    family: str
    top1: float
    top5: float
    params_m: float
    resolution: int
    source: str

    @property
    def model(self) -> str:
        """Name of the architecture in timm, without the tag of the weights."""
        return self.checkpoint.split(".")[0]

    @property
    def short(self) -> str:
        return self.model.removeprefix("mobilenetv4_").removeprefix("tf_")


@functools.cache
def _file() -> dict[str, Any]:
    return json.loads((resources.files("mnv4_ops.bench") / "data" / "accuracy.json").read_text())


def checkpoints(*families: str) -> tuple[Checkpoint, ...]:
    """Checkpoints of the families named (all without a name), in the order of the file."""
    rows = (Checkpoint(**row) for row in _file()["timm"])
    return tuple(row for row in rows if not families or row.family in families)


def paper() -> dict[str, dict[str, Any]]:
    """{model of the ledger: top1, params_m, gmac, source} of the paper's table 6."""
    return {row["model"]: row for row in _file()["paper"]}
