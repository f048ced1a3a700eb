"""What the commands share: options, one-line errors, JSON on request."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

DEVICES = ("cpu", "cuda")
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.")]
Keep = Annotated[
    bool,
    typer.Option("--keep", help="Keep what the --json file has and is not measured now (same commit, packages, CPU)."),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON ('-': stdout).")]


def fail(message: str) -> typer.Exit:
    """One line on stderr; raise the result."""
    typer.echo(f"mnv4-ops: error: {message}", err=True)
    return typer.Exit(2)


def console_for(json_file: Path | None) -> Console:
    # with JSON on stdout the tables go to stderr; a pipe gets wide lines that nothing wraps
    console = Console(stderr=json_file == Path("-"))
    return console if console.is_terminal else Console(stderr=json_file == Path("-"), width=200, highlight=False)


def write(json_file: Path | None, value: Any) -> None:
    if json_file is None:
        return
    text = json.dumps(value, indent=1) + "\n"
    if json_file == Path("-"):
        sys.stdout.write(text)
        return
    json_file.parent.mkdir(parents=True, exist_ok=True)
    # whole or not at all: a run may be cut off at any time
    part = json_file.with_name(f"{json_file.name}.part")
    part.write_text(text)
    part.replace(json_file)


def earlier(keep: bool, json_file: Path | None, schema: str, environment: Any, **same: Any) -> Any:
    """With --keep the document of the --json file, if there is one; wrong usage is one line before anything is
    measured.
    """
    if not keep:
        return None
    from mnv4_ops.bench import join
    from mnv4_ops.bench.errors import BenchError

    if json_file is None or json_file == Path("-"):
        raise fail("--keep: goes with --json FILE")
    try:
        return join.earlier(json_file, schema, environment(), **same)
    except BenchError as error:
        raise fail(str(error)) from None


def keep_part(document: Any, json_file: Path | None, old: Any) -> None:
    """Writes what there is so far, so that a run that is cut off leaves it."""
    from mnv4_ops.bench import join

    write(json_file, document if old is None else join.joined(old, document)[0])


def finish(outcome: Any, json_file: Path | None, markdown: Path | None, old: Any = None) -> None:
    """Writes an outcome of the bench, beside the results of `old`; exit status 1 if something in it was red."""
    document, text = outcome.document, outcome.markdown
    if old is not None:
        from mnv4_ops.bench import join

        document, text = join.joined(old, document)
    write(json_file, document)
    if markdown is not None:
        markdown.write_text(text)
    if not outcome.ok:
        raise typer.Exit(1)


def check_writable(option: str, file: Path | None) -> None:
    # found out now and not after ten minutes of measuring
    if file is None or file == Path("-"):
        return
    if file.is_dir():
        raise fail(f"{option}: expected a file to write, got the folder {str(file)!r}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        file.open("a").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise fail(f"{option}: {str(file)!r} cannot be written: {error.strerror}") from None


def words(values: list[str]) -> list[str]:
    return [word for value in values for word in (part.strip() for part in value.split(",")) if word]


def number(option: str, text: str, *, low: int, high: int) -> int:
    # parsed here, so that a wrong one is one line like every other error
    if not text.isdecimal() or not low <= int(text) <= high:
        raise fail(f"{option}: expected a whole number from {low} to {high}, got {text!r}")
    return int(text)


def device_of(device: str, **only: tuple[str, Any]) -> str:
    """Checks --device; `only` maps options to (the device that has them, the value given or None)."""
    if device not in DEVICES:
        raise fail(f"--device: expected one of {', '.join(DEVICES)}, got {device!r}")
    for option, (owner, value) in only.items():
        if value and owner != device:
            raise fail(f"--{option}: goes with --device {owner}, not with --device {device}")
    return device


def dtypes_of(given: list[str] | None) -> list[str]:
    from mnv4_ops.check_gpu import DTYPES

    names = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
    chosen = [names.get(word, word) for word in words(given or [])]
    for name in chosen:
        if name not in DTYPES:
            raise fail(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return list(dict.fromkeys(chosen))


def numbers(option: str, values: list[str], *, low: int = 1, high: int = 4096) -> list[int]:
    found = [number(option, word, low=low, high=high) for word in words(values)]
    if not found:
        raise fail(f"{option}: expected at least one number")
    return list(dict.fromkeys(found))
