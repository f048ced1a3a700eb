"""The ledger: every block of every model as a spec, generated from `definitions`. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..spec import BlockSpec, ConvSpec, FusedIBSpec, HeadSpec, LinearSpec, MQASpec, PoolSpec, Spec, UIBSpec
from .definitions import HIDDEN, MODELS, ModelDefinition, Row, definition, make_divisible


@dataclass(frozen=True)
class LedgerEntry:
    """One row of a model: `name` as in timm's `blocks.<stage>.<index>`, or stem, pool, conv_head, classifier.

    `height` and `width` are rows and columns of the input of the row, in pixels.
    """

    model: str
    name: str
    spec: Spec
    height: int
    width: int

    @property
    def macs(self) -> int:
        return self.spec.macs(self.height, self.width)

    @property
    def params(self) -> int:
        return self.spec.params()

    @property
    def out_hw(self) -> tuple[int, int]:
        return self.spec.out_hw(self.height, self.width)

    def bytes(self, batch: int = 1) -> int:
        return self.spec.bytes(self.height, self.width, batch)


def _row_spec(row: Row, model: ModelDefinition, c_in: int, act: str, padding: str) -> BlockSpec:
    c_out = model.scale(row.c_out)
    c_mid = make_divisible(c_in * row.ratio)
    residual = row.stride == 1 and c_in == c_out
    if row.op == "conv":
        return ConvSpec(c_in, c_out, row.kernel, row.stride, act, padding)
    if row.op == "fused_ib":
        return FusedIBSpec(c_in, c_mid, c_out, row.kernel, row.stride, act, padding, residual)
    if row.op == "uib":
        return UIBSpec(c_in, c_mid, c_out, row.start, row.mid, row.stride, act, padding, residual, model.layer_scale)
    return MQASpec(
        c_in,
        row.heads,
        row.head_dim,
        row.head_dim,
        kv_stride=row.kv_stride,
        kv_kernel=row.kernel,
        residual=residual,
        layer_scale=model.layer_scale,
        padding=padding,
    )


def model_specs(
    model: str, *, in_chans: int = 3, classes: int = 1000, act: str | None = None, padding: str = "symmetric"
) -> tuple[tuple[str, Spec], ...]:
    """All (name, spec) rows of a model in order of execution; the row `classifier` is absent when classes is 0.

    `act` None takes the model's own activation. ValueError for an unknown model.
    """
    source = definition(model)
    act = act or source.act
    c = source.stem_channels
    rows: list[tuple[str, Spec]] = [("stem", ConvSpec(in_chans, c, 3, 2, act, padding))]
    for i, stage in enumerate(source.stages):
        for j, row in enumerate(stage):
            spec = _row_spec(row, source, c, act, padding)
            rows.append((f"{i}.{j}", spec))
            c = spec.channels[1]
    rows += [("pool", PoolSpec(c)), ("conv_head", ConvSpec(c, HIDDEN, 1, 1, act, padding))]
    if classes:
        rows.append(("classifier", LinearSpec(HIDDEN, classes)))
    return tuple(rows)


def head_spec(model: str, classes: int = 1000, act: str | None = None) -> HeadSpec:
    """The rows 4.0 (1x1 before the pool), pool, conv_head and classifier of a model as one `HeadSpec`."""
    rows = dict(model_specs(model, classes=classes, act=act))
    last, hidden = rows["4.0"], rows["conv_head"]
    assert isinstance(last, ConvSpec)
    assert isinstance(hidden, ConvSpec)
    return HeadSpec(last.c_in, last.c_out, hidden.c_out, classes, hidden.act)


def standard_resolution(model: str) -> int:
    """Side in pixels of the square image that the model is usually quoted at."""
    return definition(model).resolution


def ledger(
    model: str | Iterable[str] | None = None,
    resolution: int | tuple[int, int] | None = None,
    *,
    classes: int = 1000,
    padding: str = "symmetric",
) -> tuple[LedgerEntry, ...]:
    """Every row of one model, of several, or of the five models (None).

    `resolution` is a side or (h, w) in pixels, None the standard one of each model.
    """
    names = MODELS if model is None else (model,) if isinstance(model, str) else tuple(model)
    entries: list[LedgerEntry] = []
    for name in names:
        side = standard_resolution(name) if resolution is None else resolution
        h, w = (side, side) if isinstance(side, int) else side
        if h < 1 or w < 1:
            raise ValueError(f"ledger: expected resolution of at least 1 x 1 pixels, got {resolution!r}")
        for row, spec in model_specs(name, classes=classes, padding=padding):
            entry = LedgerEntry(definition(name).name, row, spec, h, w)
            entries.append(entry)
            h, w = entry.out_hw
    return tuple(entries)
