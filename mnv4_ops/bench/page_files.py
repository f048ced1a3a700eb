"""Result files on disk: which there are, what kind each is, and what every section says about a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mnv4_ops.bench import gpu_report, op_run, pareto, report
from mnv4_ops.bench import peers as registry
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.page import Section

Document = dict[str, Any]
LABELS = {peer.name: peer.label for peer in (*registry.PEERS, *registry.GPU_PEERS)}


def load(folder: Path) -> dict[str, Document]:
    """{stem: document} of all JSON files that hold results."""
    if not folder.is_dir():
        raise BenchError(f"--results: expected a folder of result files, got {str(folder)!r}")
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            document = json.loads(file.read_text())
        except ValueError as error:
            raise BenchError(f"--results: {str(file)!r} is no JSON: {error}") from None
        if isinstance(document, list):
            # benchmarks/gpu_mqa.py writes its rows alone
            document = {"mqa": document}
        if isinstance(document, dict) and kind_of(document) is not None:
            found[file.stem] = document
    if not found:
        raise BenchError(f"--results: no result files in {str(folder)!r}")
    return found


def kind_of(document: Document) -> str | None:
    """models, ops, gpu, pareto, arm, or None for what is no result. A file is told by its `schema`, older ones by what
    they hold.
    """
    schemas = {report.SCHEMA: "models", op_run.SCHEMA: "ops", gpu_report.SCHEMA: "gpu", pareto.SCHEMA: "pareto"}
    if document.get("schema") in schemas:
        return schemas[document["schema"]]
    rows = document.get("mqa")
    if ("cells" in document and "device" in document) or (
        rows and all(isinstance(row, dict) and {"block", "us"} <= set(row) for row in rows)
    ):
        return "gpu"
    return "arm" if str(document.get("kind", "")).startswith("emulated") else None


def machine_of(document: Document) -> str:
    """Name of the GPU, or of the CPU and its best instruction set."""
    env = document.get("environment") or {}
    if env.get("gpu"):
        return str(env["gpu"]["name"])
    cpu = env.get("cpu") or {}
    if "tier" in cpu:
        # CPUs of two generations may have one name
        return f"{cpu['model']}, {cpu['tier']}"
    return str(cpu.get("model") or document.get("device") or document.get("emulator") or "unknown")


def section_of(stem: str, document: Document, title: str, intro: str) -> Section:
    """An empty section about a file: its machine in the title, its environment and method at the end."""
    return Section(stem, f"{title}: {machine_of(document)}", intro, details=_details(document))


def _details(document: Document) -> dict[str, str]:
    env = document.get("environment") or {}
    packages = env.get("packages") or document.get("versions") or {}
    details = {
        "machine": machine_of(document),
        "date": str(env.get("date") or document.get("date", ""))[:10],
        "commit": env.get("commit") or "not recorded",
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    cpu = env.get("cpu")
    if cpu:
        details["CPU tier"] = f"{cpu['tier']} of {', '.join(cpu['tiers'])}; {env['platform']}, {env['python']}"
    details |= {key: str(value) for key, value in (document.get("method") or {}).items()}
    return {name: value for name, value in details.items() if value}
