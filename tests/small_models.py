"""Models of timm with few blocks, for tests that trace or compile: torch takes its time for each block."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from mnv4_ops.reference import randomize_


def few_blocks(model: nn.Module) -> Any:
    """Of the blocks with a skip only `blocks[2][1]` stays; the others set the channels and strides."""
    stages: Any = model.blocks
    for i, stage in enumerate(stages):
        kept = (block for j, block in enumerate(stage) if (i, j) == (2, 1) or not block.has_skip)
        stages[i] = nn.Sequential(*kept)
    return model


@functools.cache
def _built(name: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    import timm

    return few_blocks(randomize_(timm.create_model(name, **dict(options))).eval())


def model_of_few_blocks(name: str, **options: Any) -> Any:
    """A copy of its own, in eval mode, everything random."""
    return copy.deepcopy(_built(name, tuple(sorted(options.items()))))
