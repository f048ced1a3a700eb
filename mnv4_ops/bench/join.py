"""A measurement in several sittings: new results beside those that a file already has.

A result belongs to what it says of itself (case, batch, threads, dtype ...); measured again, it takes the place of the
old one. Only results of one commit, one set of packages and one machine go into one file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mnv4_ops.bench import gpu_report, op_run, pareto, report
from mnv4_ops.bench.errors import BenchError

Document = dict[str, Any]
_SAME = ("commit", "packages", "cpu", "gpu")


class _Kind(NamedTuple):
    results: str
    identity: tuple[str, ...]
    markdown: Callable[[Document], str]


_KINDS = {
    report.SCHEMA: _Kind("cells", ("model", "resolution", "batch", "threads"), report.markdown),
    gpu_report.SCHEMA: _Kind("cells", ("model", "resolution", "batch", "dtype"), gpu_report.markdown),
    op_run.SCHEMA: _Kind("rows", op_run.IDENTITY, op_run.markdown),
    pareto.SCHEMA: _Kind("points", ("checkpoint", "measured_resolution"), pareto.markdown),
}


def earlier(file: Path, schema: str, environment: Document, **same: Any) -> Document | None:
    """The results in a file that new ones of a schema and environment may join, None if there is no file; `same` are
    further entries of the document that have to be equal. Raises BenchError for results that do not go together.
    """
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text())
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("schema") != schema or schema not in _KINDS:
        raise BenchError(f"--keep: {str(file)!r} holds no results that these can join")
    pairs = {key: (document["environment"].get(key), environment.get(key)) for key in _SAME}
    pairs |= {key: (document.get(key), value) for key, value in same.items()}
    for key, (old, new) in pairs.items():
        if old != new:
            where = f"{str(file)!r} was measured with another {key}: {old}, here {new}"
            raise BenchError(f"--keep: {where}; name a new file or leave out --keep")
    return document


def joined(old: Document, new: Document) -> tuple[Document, str]:
    """(both as one document, its Markdown): old results in their order, replaced where there are new ones, then the
    others of the new. `earlier` says whether they go together.
    """
    kind = _KINDS[old["schema"]]

    def key(result: Document) -> tuple[Any, ...]:
        return tuple(result[name] for name in kind.identity)

    results = {key(result): result for document in (old, new) for result in document[kind.results]}
    document = {**new, kind.results: list(results.values())}
    if "ceilings" in new:
        limits = {limit["threads"]: limit for source in (old, new) for limit in source["ceilings"]}
        document["ceilings"] = [limits[threads] for threads in sorted(limits)]
    left = dict.fromkeys([*old.get("not_measured", []), *new.get("not_measured", [])])
    if left and old["schema"] == op_run.SCHEMA:
        measured = {op_run.title(row) for row in results.values()}
        document["not_measured"] = [name for name in left if name not in measured]
    if "seconds" in new["method"]:
        document["method"] = {**new["method"], "seconds": old["method"]["seconds"] + new["method"]["seconds"]}
    return document, kind.markdown(document)
