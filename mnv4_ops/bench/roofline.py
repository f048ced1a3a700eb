"""The paper's roofline (section 4): a layer takes max(MACs / peak MACs, bytes / peak bandwidth), a model the sum.

In units of the time of one MAC that is max(MACs, ridge x bytes), with the ridge point = peak MACs / peak bandwidth in
MACs per byte: a cost in MAC-equivalents, the MACs themselves at ridge point 0. *Unfused* every layer reads its input
and its weights and writes its output; *fused* a block does so once, and what lies between its layers never moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from mnv4_ops.bench import published
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.layers import Layer, of_module, of_spec
from mnv4_ops.spec import MODELS, ledger

# fitted to measured INT8 latencies (table 16 of the paper), MACs per byte
FITTED = {"pixel6-cpu": 31.2, "s23-cpu": 39.7, "pixel4-dsp": 347.3, "pixel8-edgetpu": 433.8}
LOW, HIGH = 0.0, 500.0
GENERATIONS = ("MobileNetV1", "MobileNetV2", "MobileNetV3", "MobileNetV4")


class Scale(NamedTuple):
    """Images of a batch (the weights are read once for all) and bytes an element."""

    batch: int = 1
    itemsize: int = 1


ONE = Scale()


@dataclass(frozen=True)
class Block:
    """One row of a model. Counts are for one image; `reads` and `writes` are elements at the edges of the block."""

    name: str
    kind: str
    layers: tuple[Layer, ...]

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    def bytes(self, *, fused: bool, scale: Scale = ONE) -> int:
        """Bytes moved for a batch; the weights once."""
        if fused:
            moved = self.layers[0].reads + self.layers[-1].writes
        else:
            moved = sum(layer.reads + layer.writes for layer in self.layers)
        return scale.itemsize * (scale.batch * moved + self.weights)

    def cost(self, ridge: float, *, fused: bool, scale: Scale = ONE) -> float:
        """MAC-equivalents of a batch at a ridge point in MACs per byte."""
        if fused:
            return max(scale.batch * self.macs, ridge * self.bytes(fused=True, scale=scale))
        return sum(layer_cost(layer, ridge, scale=scale) for layer in self.layers)

    def intensity(self, *, fused: bool, scale: Scale = ONE) -> float:
        """MACs per byte: compute-bound below this ridge point, memory-bound above."""
        return scale.batch * self.macs / self.bytes(fused=fused, scale=scale)

    def bound(self, ridge: float, *, fused: bool, scale: Scale = ONE) -> str:
        """`memory` or `compute`; unfused, where the layers differ, `memory 40 %` says which share of the cost."""
        if fused:
            return "memory" if ridge > self.intensity(fused=True, scale=scale) else "compute"
        total = self.cost(ridge, fused=False, scale=scale)
        share = memory_cost(self.layers, ridge, scale=scale) / total
        if not 0.005 < share < 0.995:
            return "memory" if share > 0.5 else "compute"
        return f"memory {100 * share:.0f} %"


def layer_cost(layer: Layer, ridge: float, *, scale: Scale = ONE) -> float:
    return max(
        scale.batch * layer.macs, ridge * scale.itemsize * (scale.batch * (layer.reads + layer.writes) + layer.weights)
    )


def memory_cost(layers: Iterable[Layer], ridge: float, *, scale: Scale = ONE) -> float:
    """The part of the cost that lies in memory-bound layers."""
    costs = ((layer, layer_cost(layer, ridge, scale=scale)) for layer in layers)
    return sum(cost for layer, cost in costs if cost > scale.batch * layer.macs)


def blocks(model: str, resolution: int | None = None) -> tuple[Block, ...]:
    """The rows of a model of the ledger that compute something, at its standard resolution unless given."""
    rows = []
    for entry in ledger(model, resolution):
        layers = of_spec(entry.spec, entry.height, entry.width)
        if layers:
            rows.append(Block(entry.name, entry.spec.kind, layers))
    return tuple(rows)


def cost(rows: Sequence[Block], ridge: float, *, fused: bool = False, scale: Scale = ONE) -> float:
    """MAC-equivalents of all rows."""
    return sum(row.cost(ridge, fused=fused, scale=scale) for row in rows)


def memory_share(rows: Sequence[Block], ridge: float, *, scale: Scale = ONE) -> float:
    """Share of the unfused cost that lies in memory-bound layers, 0 to 1."""
    layers = [layer for row in rows for layer in row.layers]
    total = cost(rows, ridge, scale=scale)
    return memory_cost(layers, ridge, scale=scale) / total


def ridge_point(text: str, machine: float | None = None) -> tuple[str, float]:
    """(label, MACs per byte) of a number from 0 to 500, a name of `FITTED`, or `machine` (the value given)."""
    if text in FITTED:
        return f"{text} ({FITTED[text]:g})", FITTED[text]
    if text == "machine":
        if machine is None:
            raise BenchError("--ridge machine: the ridge point of this machine could not be measured")
        return f"this machine ({machine:.1f})", machine
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not LOW <= value <= HIGH:
        known = ", ".join(FITTED)
        raise BenchError(f"--ridge: expected a number from 0 to 500 (MACs per byte), {known} or machine, got {text!r}")
    return f"{value:g}", value


@dataclass(frozen=True)
class SweptModel:
    """A whole model in the comparison of generations; `top1` is published, `layers` are of one image."""

    name: str
    family: str
    top1: float
    resolution: int
    layers: tuple[Layer, ...]

    def cost(self, ridge: float) -> float:
        """Unfused MAC-equivalents at one byte an element, as in the paper."""
        return sum(layer_cost(layer, ridge) for layer in self.layers)


@cache
def generations() -> tuple[SweptModel, ...]:
    """MobileNetV1 to V4: V4 from the ledger, the earlier ones traced from timm where it is installed."""
    found = []
    for row in published.checkpoints(*GENERATIONS):
        name = row.short
        if name in MODELS:
            layers = tuple(layer for block in blocks(name, row.resolution) for layer in block.layers)
        else:
            try:
                import timm
            except ImportError:
                continue
            layers = of_module(timm.create_model(row.model), row.resolution)
        found.append(SweptModel(name, row.family, row.top1, row.resolution, layers))
    return tuple(found)


def relative_to_best(models: Sequence[SweptModel], ridge: float) -> dict[str, float]:
    """Cost of each model over that of the cheapest one that is at least as accurate: 1 on the Pareto front."""
    costs = {model.name: model.cost(ridge) for model in models}
    return {
        model.name: costs[model.name] / min(costs[other.name] for other in models if other.top1 >= model.top1)
        for model in models
    }
