"""Tables of tuned configurations: those that ship with the package, and the user's own from `mnv4-ops tune`.

A table is one JSON file per GPU, `{"format": 1, "device": name, "versions": {...}, "entries": {...}}`; what the entries
are is a matter of `mnv4_ops.triton_kernels`. Entries of the user's table come before shipped ones, those of the GPU
itself before those of its family.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
CACHE_VARIABLE = "MNV4_OPS_CACHE"


def cache_folder() -> Path:
    """Where the user's files go: MNV4_OPS_CACHE, or mnv4_ops in the cache folder of the system."""
    own = os.environ.get(CACHE_VARIABLE, "").strip()
    if own:
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mnv4_ops"
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "mnv4_ops"


def slug(device: str) -> str:
    """File name of a GPU's table, without suffix: "NVIDIA H100 80GB HBM3" -> nvidia_h100_80gb_hbm3."""
    return "".join(c if c.isalnum() else "_" for c in device.lower())


def user_file(device: str) -> Path:
    return cache_folder() / "tuned" / f"{slug(device)}.json"


def shipped_folder() -> Path:
    file = importlib.import_module("mnv4_ops.triton_kernels").__file__
    assert file is not None
    return Path(file).parent / "tuned"


def shipped_files(device: str) -> list[Path]:
    """The tables that ship for a GPU, those that count more last: of GPUs with the same chip, then its own.

    `tuned/index.json` has the families by the start of the names: what was measured on an H200 serves an H100.
    """
    folder, own = shipped_folder(), slug(device)
    tables = [
        table
        for family in _document(folder / "index.json").get("families", [])
        if device.startswith(tuple(family["names"]))
        for table in family["tables"]
    ]
    files = [folder / f"{table}.json" for table in (*(t for t in tables if t != own), own)]
    return [file for file in files if file.is_file()]


def _document(file: Path) -> dict[str, Any]:
    """{} where there is no file, or one that cannot be used: kernels run untuned then."""
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) and document.get("format", FORMAT) == FORMAT else {}


def _entries(file: Path) -> dict[str, Any]:
    entries = _document(file).get("entries")
    return entries if isinstance(entries, dict) else {}


def merged(*tables: dict[str, Any]) -> dict[str, Any]:
    """Entries of several tables, later ones first: {block: {size: configuration}}."""
    result: dict[str, Any] = {}
    for table in tables:
        for block, sizes in table.items():
            result[block] = {**result.get(block, {}), **sizes}
    return result


@functools.cache
def table(device: str) -> dict[str, Any]:
    """All entries for a GPU, by the name that torch gives it."""
    return merged(*map(_entries, shipped_files(device)), _entries(user_file(device)))


def describe(device: str) -> dict[str, Any]:
    """For `info`: shipped and own tables with their numbers of entries (None: no such table)."""

    def count(files: Sequence[Path]) -> int | None:
        files = [file for file in files if file.is_file()]
        return sum(len(sizes) for sizes in merged(*map(_entries, files)).values()) if files else None

    return {
        "shipped": count(shipped_files(device)),
        "own": count([user_file(device)]),
        "own_file": str(user_file(device)),
    }


def save(device: str, entries: dict[str, Any]) -> Path:
    """Adds entries to the user's table."""
    from mnv4_ops import _info

    file = user_file(device)
    versions = {name: _info.package_version(name) for name in ("torch", "triton")}
    document = {
        "format": FORMAT,
        "device": device,
        "versions": versions,
        "entries": merged(_entries(file), entries),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    # a reader sees the old table or the new one
    part.replace(file)
    table.cache_clear()
    return file


def jobs(models: Iterable[str], resolution: int | None = None) -> list[tuple[dict[str, Any], int, int]]:
    """Distinct blocks of some models as (keywords of Block or Head, rows, columns); the last parts as one head."""
    from mnv4_ops import check
    from mnv4_ops.bench import blocks

    found: dict[str, tuple[dict[str, Any], int, int]] = {}
    for model in models:
        for unit in blocks.units(model, resolution):
            keywords = check.describe(unit.spec, check.random_module(unit.spec).params()).keywords
            found.setdefault(
                repr((sorted(keywords.items()), unit.height, unit.width)), (keywords, unit.height, unit.width)
            )
    return list(found.values())


def tune(
    models: Iterable[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    *,
    resolution: int | None = None,
    log: Callable[[str], None] = print,
) -> tuple[Path, int]:
    """Measures configurations for the blocks of some models on the current GPU and keeps them in the user's table.

    Returns the file and the number of entries. RuntimeError says why there are no GPU kernels.
    """
    import torch

    from mnv4_ops.ops import cuda

    reason = cuda.unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    todo = jobs(models, resolution)
    entries: dict[str, Any] = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        tf32 = dtype is torch.float32 and cuda.allow_tf32()
        found = cuda.kernels().tune(todo, dtype, tuple(batches), tf32=tf32, log=log)
        entries = merged(entries, found)
    device = torch.cuda.get_device_name()
    return save(device, entries), sum(len(sizes) for sizes in entries.values())
