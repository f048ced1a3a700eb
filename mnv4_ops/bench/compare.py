"""Two result files beside each other: by how much each row changed, and whether that is more than noise.

By ratio: a row's time is first divided by the geometric mean of the peers that both files have in it, so that another
machine, clock or load drops out. A change counts if it is larger than the threshold and larger than the noise, which is
the half widths of the 20 - 80 % intervals added in quadrature.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mnv4_ops.bench import inputs, page_files, rows
from mnv4_ops.bench.errors import BenchError

OURS = rows.OURS
Variants = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Change:
    """`ratio` is new over old, above 1 slower; `noise` how much of that the quantiles explain."""

    row: str
    old_ms: float
    new_ms: float
    peers: tuple[str, ...]
    ratio: float
    noise: float
    threshold: float

    @property
    def verdict(self) -> str:
        margin = 1 + max(self.threshold, self.noise)
        return "slower" if self.ratio > margin else "faster" if self.ratio < 1 / margin else "same"


def read(file: Path) -> dict[str, Variants]:
    """{name of the row: variants} of a result file of `bench` or of `pytest benchmarks --benchmark-json`."""
    try:
        document = json.loads(file.read_text())
    except OSError as error:
        raise BenchError(f"{str(file)!r} cannot be read: {error.strerror}") from None
    except ValueError:
        raise BenchError(f"expected a result file in JSON, got {str(file)!r}") from None
    found: dict[str, Variants] = {}
    if isinstance(document, dict) and "benchmarks" in document:
        document = {"rows": [bench["extra_info"] for bench in document["benchmarks"] if "op" in bench["extra_info"]]}
        kind: str | None = "ops"
    else:
        kind = page_files.kind_of(document) if isinstance(document, dict) else None
    if kind == "ops":
        for row in document["rows"]:
            found[f"{row['op']} {row['case']}, batch {row['batch']}, {row['threads']}t, {row['dtype']}"] = row[
                "variants"
            ]
    elif kind == "models":
        for cell in document["cells"]:
            name = f"{inputs.ledger_name(cell['model'])} {cell['resolution']}"
            found[f"{name}, batch {cell['batch']}, {cell['threads']}t"] = cell["variants"]
    elif kind == "gpu":
        for cell in document["cells"]:
            for clock in ("graphs", "calls"):
                name = f"{inputs.ledger_name(cell['model'])} {cell['resolution']}"
                found[f"{name}, batch {cell['batch']}, {cell['dtype']}, {clock}"] = cell[clock]
    else:
        raise BenchError(f"expected results of models, blocks or ops, got {str(file)!r}")
    timed = {name: {k: v for k, v in variants.items() if "median_ms" in v} for name, variants in found.items()}
    return {name: variants for name, variants in timed.items() if OURS in variants}


def _half_width(facts: Mapping[str, Any]) -> float:
    return float(facts["q80_ms"] - facts["q20_ms"]) / 2 / float(facts["median_ms"])


def changes(
    old: Mapping[str, Variants], new: Mapping[str, Variants], *, threshold: float = 0.03, absolute: bool = False
) -> list[Change]:
    """Rows that both have, in the order of the new file. `absolute` compares times as they are."""
    found = []
    for name in new:
        if name not in old:
            continue
        a, b = old[name], new[name]
        peers = () if absolute else tuple(peer for peer in a if peer in b and not peer.startswith(OURS))
        ratio = b[OURS]["median_ms"] / a[OURS]["median_ms"]
        noise = _half_width(a[OURS]) ** 2 + _half_width(b[OURS]) ** 2
        if peers:
            drift = sum(math.log(b[peer]["median_ms"] / a[peer]["median_ms"]) for peer in peers) / len(peers)
            ratio /= math.exp(drift)
            noise += sum(_half_width(side[peer]) ** 2 for peer in peers for side in (a, b)) / len(peers) ** 2
        times = (a[OURS]["median_ms"], b[OURS]["median_ms"])
        found.append(Change(name, *times, peers, ratio, math.sqrt(noise), threshold))
    return found


def geomean(found: list[Change]) -> float:
    return math.exp(sum(math.log(change.ratio) for change in found) / len(found))


def table(found: list[Change], *, everything: bool) -> Table:
    """Changed rows, the largest first; with `everything` also the others."""
    view = Table(title="New over old; above 1 is slower", title_justify="left", title_style="bold")
    for index, column in enumerate(("row", "old ms", "new ms", "peers", "ratio", "noise", "")):
        view.add_column(column, justify="left" if index == 0 else "right")
    for change in sorted(found, key=lambda change: -change.ratio):
        if change.verdict == "same" and not everything:
            continue
        view.add_row(
            change.row,
            f"{change.old_ms:.4f}",
            f"{change.new_ms:.4f}",
            str(len(change.peers)),
            f"{change.ratio:.3f}",
            f"{100 * change.noise:.1f} %",
            change.verdict,
            style={"slower": "bold red", "faster": "green"}.get(change.verdict),
        )
    return view
