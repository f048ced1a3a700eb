"""One row of the op tables: an op at one size, dtype, batch and number of threads, against every peer.

Gate first (a wrong answer prints no speed), then all variants interleaved. A row is a JSON-ready dict.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import mnv4_ops
from mnv4_ops.bench import gate, machine, timing
from mnv4_ops.bench import peers as registry
from mnv4_ops.bench.ceilings import Ceilings
from mnv4_ops.bench.ops import Case, Op
from mnv4_ops.bench.peers.base import Peer, Run, arguments_of

OURS = "mnv4_ops"
# a row is quoted only against all of these
HEADLINE = {"cpu": ("onnxruntime", "openvino", "xnnpack"), "cuda": ("compile_graph",)}
# and of attention also against the form that SDPA has fused kernels for
HEADLINE_MQA = {"cpu": (), "cuda": ("compile_expanded_graph",)}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# of the error that the 2x rule allows us; runtimes keep other intermediates than torch does
PEER_SLACK = 2.0
_COLD_ROUNDS = 5


@dataclass(frozen=True)
class Setting:
    """Everything of a row but the op and its case."""

    batch: int = 1
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"


def peers_of(device: str) -> tuple[Peer, ...]:
    """The peers of a device; on a GPU those whose calls are captured, since a single op is no call from Python."""
    return registry.PEERS if device == "cpu" else tuple(peer for peer in registry.GPU_PEERS if peer.captured)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class _Gate:
    """float32 on the CPU: the model's own tolerance; otherwise the 2x rule against float64."""

    def __init__(self, module: torch.nn.Module, example: Any, setting: Setting) -> None:
        inputs = arguments_of(example)
        self.plain_fp32 = setting.dtype == "float32" and setting.device == "cpu"
        if self.plain_fp32:
            self.reference = module(*inputs)
            return
        # of the rounded parameters and input, on the device
        self.truth = _placed(module, setting).double()(*(_placed(x, setting).double() for x in inputs))
        self.plain = _placed(module, setting)(*(_placed(x, setting) for x in inputs))

    def verdict(self, output: Any, ours: bool) -> tuple[float, str | None]:
        """(error as a fraction of what is allowed, why it is wrong)."""
        if self.plain_fp32:
            found = gate.compare(output, self.reference)
            # random inputs of one block decide no class
            error = found.error / found.tolerance
        else:
            from mnv4_ops.check import of_allowed

            tensor = gate.as_tensor(output, self.plain).to(self.plain.dtype).to(self.plain.device)
            error = max(of_allowed(tensor, self.plain, self.truth)) / (1.0 if ours else PEER_SLACK)
        # written so that NaN fails
        return error, None if error <= 1 else f"{gate.WRONG}: {error:.2g} of the allowed error"


def prepare(
    op: Op, case: Case, setting: Setting, peers: Sequence[str]
) -> tuple[dict[str, Run], dict[str, str], dict[str, float]]:
    """(variants that passed the gate, why each other one is left out, errors as fractions of the allowed one)."""
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    errors: dict[str, float] = {}
    if setting.device == "cuda":
        # peers compile classes as they come, without the kernels of the row before
        mnv4_ops.disable()
    if "torch._dynamo" in sys.modules:
        # a class that is compiled for every row would meet the limit of its compilations
        torch.compiler.reset()
    # parameters as a user's are: converters refuse those of inference mode
    with torch.inference_mode(False), torch.no_grad():
        module, example = op.module_on(case, setting.device), op.example(case, setting.batch)
        own = _placed(module, setting)
    judge = _Gate(module, example, setting)
    moved = tuple(_placed(x, setting) for x in arguments_of(example))
    x = moved if isinstance(example, tuple) else moved[0]

    def attempt(name: str, reason: str | None, make: Any) -> None:
        if reason is None:
            try:
                run = _captured(make()) if setting.device == "cuda" else make()
                errors[name], reason = judge.verdict(run(), name == OURS)
            except Exception as error:  # a peer's failure is a row of the table
                reason = _reason(error)
        if reason is None:
            runs[name] = run
        else:
            left_out[name] = reason

    for peer in peers_of(setting.device):
        if peer.name in peers and peer.suits(own):
            reason = peer.available() or peer.refuses(setting.dtype)
            if reason is None and isinstance(x, tuple) and not peer.several_inputs:
                reason = "takes modules of one input"
            attempt(peer.name, reason, lambda peer=peer: peer.prepare(own, x, setting.threads))
    # last: enabling throws away what torch has compiled
    refused = op.refuses(getattr(torch, setting.dtype), setting.device)
    attempt(OURS, refused, lambda: op.ours(own, case, x, setting.threads))
    return runs, left_out, errors


def _placed(thing: Any, setting: Setting) -> Any:
    """A tensor, or a copy of a module, on the device and in the dtype of a row."""
    own = copy.deepcopy(thing) if isinstance(thing, torch.nn.Module) else thing
    return own.to(setting.device, getattr(torch, setting.dtype))


def _captured(run: Run) -> Run:
    from mnv4_ops.bench import gpu_clock

    return gpu_clock.captured(run, several=True)


def describe(op: Op, case: Case, setting: Setting) -> dict[str, Any]:
    """What a row says before anything ran; counts are per call."""
    return {
        "op": op.name,
        "case": case.name,
        "places": list(case.places),
        "batch": setting.batch,
        "threads": setting.threads,
        "dtype": setting.dtype,
        "device": setting.device,
        "macs": setting.batch * op.macs(case),
        "bytes": op.bytes(case, setting.batch, ITEMSIZE[setting.dtype]),
    }


def measure(
    op: Op,
    case: Case,
    setting: Setting,
    peers: Sequence[str],
    *,
    repeats: int = 7,
    seconds: float = 1.5,
    ceilings: Ceilings | None = None,
) -> dict[str, Any]:
    """Gate and clock. `unavailable` says why a variant has no time, `red` why we have none."""
    with torch.inference_mode():
        runs, left_out, errors = prepare(op, case, setting, peers)
        stats: Mapping[str, timing.Stats] = {}
        cold: Mapping[str, timing.Stats] = {}
        switches = machine.involuntary_switches()
        if OURS in runs:
            if setting.device == "cuda":
                from mnv4_ops.bench import gpu_clock

                stats = gpu_clock.interleave(runs, rounds=repeats, seconds=seconds)
                rounds, short = min(repeats, _COLD_ROUNDS), seconds / 4
                cold = gpu_clock.interleave(runs, rounds=rounds, seconds=short, span=gpu_clock.cold_span)
            else:
                stats = timing.interleave(runs, repeats=repeats, seconds=seconds)
        switches = machine.involuntary_switches() - switches
    row = describe(op, case, setting)
    row["preempted_per_call"] = switches / max(1, sum(values.calls for values in stats.values()))
    row["variants"] = {name: values.as_dict() | {"of_allowed": errors[name]} for name, values in stats.items()}
    for name, values in cold.items():
        row["variants"][name]["cold_median_ms"] = values.median_ms
    row["unavailable"] = left_out
    row["red"] = None if OURS in runs else left_out[OURS]
    return derive(row, ceilings)


def lost(op: Op, case: Case, setting: Setting, reason: str) -> dict[str, Any]:
    """The row of a case that could not be measured."""
    row = describe(op, case, setting)
    return derive(row | {"preempted_per_call": 0.0, "variants": {}, "unavailable": {}, "red": reason})


def headline_peers(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The peers that a row has to be quoted against."""
    return HEADLINE[row["device"]] + (HEADLINE_MQA[row["device"]] if row["op"] == "mqa" else ())


def derive(row: dict[str, Any], ceilings: Ceilings | None = None) -> dict[str, Any]:
    """Adds what follows from the times: rates, fraction of the limit, the best peer, whether the row is a headline."""
    variants = row["variants"]
    limit = ceilings.limit_ms(row["macs"], row["bytes"], row["dtype"]) if ceilings is not None else None
    if limit is not None:
        row["limit_ms"], row["bound"] = limit
    for facts in variants.values():
        facts["gflops"] = 2 * row["macs"] / facts["median_ms"] / 1e6
        if limit is not None:
            facts["of_limit"] = limit[0] / facts["median_ms"]
    others = {name: facts["median_ms"] for name, facts in variants.items() if name != OURS}
    row["best_peer"] = min(others, key=others.__getitem__) if others else None
    row["headline"] = OURS in variants and all(name in variants for name in headline_peers(row))
    if OURS in variants and others:
        row["vs_best_peer"] = others[row["best_peer"]] / variants[OURS]["median_ms"]
    return row
