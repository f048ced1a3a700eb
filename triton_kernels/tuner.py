"""Measured tiles: candidates for each operation, compiled in parallel, timed by CUDA-graph replay.

`tune` is what makes the shipped tables and what `mnv4-ops tune` runs. Operations are timed one by one, then the best
of fused and separate, and of a few batch chunks, is taken for the block.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnv4_ops.spec import pad_before_after

from . import config, mqa_config, mqa_tune
from .block import Block, Head
from .candidates import candidates, unique
from .config import Config
from .launch import Launch, current_stream
from .mqa_block import MobileMQA
from .plan import Op, Packed, apart

Runner = Block | Head | MobileMQA
# (keywords of Block, Head or MobileMQA, height, width)
Job = tuple[dict[str, Any], int, int]


# (fused, operations, candidates of each; a head's first ones are those of its pool)
Variant = tuple[bool, tuple[Op, ...], list[list[Config]]]


def _choices(runner: Runner, n: int, h: int, w: int, exact: bool, sms: int, tf32: bool = False) -> list[Variant]:
    """The ways to run a block. Two that differ only in what is apart may be mixed."""
    if isinstance(runner, MobileMQA):
        return mqa_tune.variants(runner, n, h, w, int(tf32), sms)
    ways: list[tuple[bool, tuple[Op, ...]]] = [(False, runner.ops)]
    head: list[list[Config]] = []
    if isinstance(runner, Head):
        pool = runner.by_formula(n, h, w, exact)["ops"][0]
        head = [[pool] if exact else unique([pool, *({**pool, "n": c, "k": 64} for c in (32, 64, 128))])]
        h = w = 1
    else:
        last = runner.fused_ops[-1] if runner.fused_ops is not None and not exact else None
        parts = tuple(part for op in runner.ops for part in apart(op))
        if len(parts) > len(runner.ops):
            ways.append((False, parts))
        if last is not None:
            assert runner.fused_ops is not None
            pieces = -(-last.c_in // config.piece_k(last.c_in))
            ho, wo = runner.output_shape(n, h, w)[2:]
            pixels = n * ho * wo
            if last.kind == "dense" and last.c_mid <= 256 and last.c_out <= 256:
                # always the faster one where it was measured
                ways = [(True, runner.fused_ops)]
            if last.kind == "ffn" and pieces <= 4 + 4 * (last.c_in < 256) and last.c_out <= 256 and pixels >= sms * 32:
                ways = [(True, runner.fused_ops)] + (ways if pixels < sms * 48 else [])
    out = []
    for is_fused, ops in ways:
        lists, hh, ww = list(head), h, w
        for op in ops:
            lists.append(candidates(op, n, hh, ww, runner.dtype, exact, sms))
            hh, ww = op.out_hw(hh, ww)
        out.append((is_fused, ops, lists))
    return out


def make(desc: dict[str, Any], dtype: torch.dtype, device: Any) -> Runner:
    """`Head` or `MobileMQA` where the keywords are theirs, else `Block`."""
    kind = Head if "c_feat" in desc else MobileMQA if "heads" in desc else Block
    return kind(dtype=dtype, device=device, **desc)


# microseconds by what was timed; the same operation occurs in several blocks
Known = dict[str, float]


def _label(runner: Runner, ops: tuple[Op, ...], index: int, n: int, h: int, w: int, tf32: bool, option: Config) -> str:
    """Name of one operation of a block with a tile, for `Known`."""
    head = isinstance(runner, Head)
    padding = "" if head else runner.native["padding"]
    if head and index:
        h = w = 1
    key = runner.key.split(" | ")[0] if head and index == 0 else ops[index - head].key
    for op in ops[: index - head] if index >= head else ():
        h, w = op.out_hw(h, w)
    return f"{runner.dtype} {tf32} {key} {padding} {n}x{h}x{w} {sorted(option.items())}"


def _one_by_one(variant: Variant, micros: Callable[[int, Config], float]) -> Iterable[tuple[int, Config, Config]]:
    """(index of the operation, its candidate, a choice that holds it and the best known candidates of the others);
    of the candidates whose time is known already only the best.
    """
    is_fused, _, lists = variant
    best = [min(options, key=lambda option, i=i: micros(i, option)) for i, options in enumerate(lists)]
    for i, options in enumerate(lists):
        for option in options:
            if option is best[i] or math.isinf(micros(i, option)):
                ops = [option if j == i else best[j] for j in range(len(lists))]
                yield i, option, {"fused": is_fused, "chunk": 0, "ops": ops}


def _mixed(runner: Runner, whole: list[Config], parts: list[Config], times: list[float]) -> list[Config]:
    """Per operation the faster of one kernel and two; `times` are those of `whole`, then of `parts`."""
    first, second = list(zip(whole, times, strict=False)), list(zip(parts, times[len(whole) :], strict=True))
    out: list[Config] = []
    for (one, one_time), op in zip(first, runner.ops, strict=True):
        two = [second.pop(0) for _ in apart(op)]
        out += [cfg for cfg, _ in two] if sum(t for _, t in two) < one_time else [one]
    return out


# relative error in norm above which a candidate is wrong; tf32 is the loosest of the fp32 modes
LIMITS = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 3e-3}

_blocks: dict[str, Any] = {}


def _compile(task: tuple[dict[str, Any], torch.dtype, int, int, int, Config, int, bool]) -> str:
    """Worker: compiles one launch into Triton's cache. A candidate that does not compile is dropped when timed."""
    desc, dtype, n, h, w, choice, index, tf32 = task
    key = repr((desc, dtype))
    if key not in _blocks:
        _blocks[key] = make(desc, dtype, "cpu")
    try:
        _blocks[key].plan(n, h, w, choice, tf32).launches[index].compile()
    except Exception as error:
        return f"{choice['ops'][index]}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def precompile(tasks: Sequence[Any], workers: int | None = None) -> list[str]:
    """Fills Triton's cache from several processes; the failures in words."""
    workers = workers or os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return [message for message in pool.imap_unordered(_compile, tasks, chunksize=4) if message]


def graph_time(start: Callable[[], None], repeats: int, replays: int = 3) -> float:
    """Microseconds of one call: `repeats` calls in a CUDA graph, the median of a few replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        start()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            start()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / repeats)
    return sorted(times)[len(times) // 2]


def _repeats(pixels: int) -> int:
    return max(3, min(30, (1 << 21) // max(pixels, 1)))


def plain(runner: Runner, x: Tensor) -> Tensor:
    """The block in fp32 by torch's own operations on the packed parameters: what a candidate must come near to."""
    if isinstance(runner, MobileMQA):
        return mqa_tune.plain(runner, x)

    def matrix(y: Tensor, p: Packed, act: str, stride: int = 1, pad: tuple[int, ...] = ()) -> Tensor:
        weight = p.w[: p.kernel**2 * p.c_in, : p.c_out].float()
        weight = weight.reshape(p.kernel, p.kernel, p.c_in, p.c_out).permute(3, 2, 0, 1)
        y = F.conv2d(F.pad(y, pad) if pad else y, weight, None, stride)
        return _act(y * p.affine[0, : p.c_out].view(-1, 1, 1) + p.affine[1, : p.c_out].view(-1, 1, 1), act)

    def depthwise(y: Tensor, p: Packed, act: str, stride: int, pad: tuple[int, ...]) -> Tensor:
        k, c = p.kernel, p.c_out
        weight = p.taps[: k * k, :c].t().reshape(c, 1, k, k)
        return _act(F.conv2d(F.pad(y, pad), weight, p.taps[k * k, :c], stride, 0, 1, c), act)

    y = x.float()
    if isinstance(runner, Head):
        if 0 in runner.packed:
            y = matrix(y, runner.packed[0], runner.feat_act)
        y = y.mean((2, 3), keepdim=True)
    padding = "symmetric" if isinstance(runner, Head) else runner.native["padding"]
    for op in runner.ops:
        sides = [pad_before_after(size, op.kernel or 1, op.stride, padding) for size in (y.shape[3], y.shape[2])]
        pad = (*sides[0], *sides[1])
        stages = [runner.packed[s] for s in op.stages]
        if stages[0].depthwise:
            alone = op.kind == "depthwise"
            y = depthwise(y, stages[0], op.act if alone else op.dw_act, op.stride, pad)
            if not alone:
                y = matrix(y, stages[1], op.act)
        else:
            y = matrix(y, stages[0], op.act, op.stride, pad if op.kind == "dense" else ())
        if op.residual:
            y = y + x.float()
    return y.flatten(1) if isinstance(runner, Head) else y


def _act(y: Tensor, act: str) -> Tensor:
    return {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu}[act](y)


class _Timed:
    """One block at one size: input, output, and plans that share scratch."""

    def __init__(self, runner: Runner, n: int, h: int, w: int, tf32: bool) -> None:
        self.runner, self.n, self.h, self.w, self.tf32 = runner, n, h, w, tf32
        device = runner.device
        c = runner.native["c_in"] if isinstance(runner, Block) else runner.c_in
        self.x = torch.randn(n, h, w, c, device=device).to(runner.dtype).permute(0, 3, 1, 2)
        shape = runner.output_shape(n, h, w)
        self.out = torch.empty(
            shape, dtype=runner.dtype, device=device,
            memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format,
        )  # fmt: skip
        self.scratch = torch.zeros(1, dtype=torch.uint8, device=device)
        # a few images from both ends
        self.sample = sorted({*range(min(n, 3)), *range(max(n - 3, 0), n)})
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            self.want = plain(runner, self.x[self.sample])

    def error(self) -> float:
        """Of the sampled images of `out`, relative in norm."""
        return float((self.out[self.sample].float() - self.want).norm() / self.want.norm())

    def plan(self, choice: Config) -> list[Launch]:
        plan = self.runner.plan(self.n, self.h, self.w, choice, self.tf32)
        if plan.scratch > self.scratch.numel():
            self.scratch = torch.zeros(plan.scratch, dtype=torch.uint8, device=self.x.device)
        tensors = {"x": self.x, "out": self.out, "scratch": self.scratch}
        self.out.fill_(float("nan"))
        for launch in plan.launches:
            launch.first(tensors)
        error = self.error()
        if not error < LIMITS[self.runner.dtype]:
            raise RuntimeError(f"WRONG: relative error {error:.3g}")
        return plan.launches

    def fitting(self, choice: Config) -> Config:
        """The choice with tiles that the device has room for, as a first call finds them."""
        plan = self.runner.plan(self.n, self.h, self.w, choice, self.tf32)
        return self.runner.settle(plan, self.x, self.out, self.tf32).choice

    def time(self, launches: Sequence[Launch]) -> float:
        base = {
            None: 0, "x": self.x.data_ptr(), "out": self.out.data_ptr(), "scratch": self.scratch.data_ptr(),
        }  # fmt: skip
        device = self.x.device.index or 0

        def start() -> None:
            stream = current_stream(device)
            for launch in launches:
                launch.again(base, stream)

        return graph_time(start, _repeats(self.n * self.h * self.w))


def tune_block(
    runner: Runner,
    n: int,
    h: int,
    w: int,
    *,
    tf32: bool = False,
    log: Callable[[str], None] = lambda _: None,
    known: Known | None = None,
) -> tuple[Config, float]:
    """(choice, microseconds) of a packed block for n images of h x w. Times in `known` are not taken again."""
    exact = runner.dtype == torch.float32 and not tf32
    sms = config.device_limits(runner.device.index or 0)[0]
    timed = _Timed(runner, n, h, w, tf32)
    known = {} if known is None else known
    found: list[tuple[float, Config]] = []
    # the best of each operation by kind of variant, for mixing
    best: dict[int, tuple[list[Config], list[float]]] = {}
    for variant in _choices(runner, n, h, w, exact, sms, tf32):
        is_fused, ops_of, lists = variant

        def label(i: int, option: Config, ops_of: tuple[Op, ...] = ops_of) -> str:
            return _label(runner, ops_of, i, n, h, w, tf32, option)

        for i, option, choice in _one_by_one(variant, lambda i, o: known.get(label(i, o), math.inf)):
            if label(i, option) in known:
                continue
            try:
                known[label(i, option)] = timed.time(timed.plan(choice)[i :: len(choice["ops"])])
            except Exception as error:
                log(f"    {option}: {str(error)[:80]}")
                continue
            log(f"    op {i} {known[label(i, option)]:8.2f} us {option}")
        ranked = [
            sorted((o for o in options if label(i, o) in known), key=lambda o, i=i: known[label(i, o)])
            for i, options in enumerate(lists)
        ]
        if not all(ranked):
            continue
        # a time from elsewhere says nothing of whether the result is right here
        for place in range(max(map(len, ranked))):
            ops = [options[min(place, len(options) - 1)] for options in ranked]
            micros = _whole(timed, {"fused": is_fused, "chunk": 0, "ops": ops}, found, log)
            if micros is not None:
                parts = [known[label(i, o)] for i, o in enumerate(ops)]
                log(f"  {'fused' if is_fused else 'split'}: {micros:.2f} us {[round(t, 2) for t in parts]}")
                if not is_fused:
                    best[len(best)] = (ops, parts)
                break
    if len(best) == 2:
        mixed = _mixed(runner, best[0][0], best[1][0], best[0][1] + best[1][1])
        if mixed not in (best[0][0], best[1][0]):
            micros = _whole(timed, {"fused": False, "chunk": 0, "ops": mixed}, found, log)
            log(f"  mixed: {micros} us")
    if not found:
        raise RuntimeError(f"{runner.key} {n}x{h}x{w}: no candidate runs and is right")
    micros, choice = min(found, key=lambda item: item[0])
    return choice, micros


def _whole(
    timed: _Timed, choice: Config, found: list[tuple[float, Config]], log: Callable[[str], None]
) -> float | None:
    """Times a whole block and adds it to `found`; None where it does not run or is wrong."""
    try:
        micros = timed.time(timed.plan(choice))
    except Exception as error:
        log(f"  {choice}: {str(error)[:80]}")
        return None
    found.append((micros, choice))
    return micros


def tasks_for(
    jobs: Sequence[Job], dtype: torch.dtype, batches: Sequence[int], tf32: bool, sms: int, known: Known | None = None
) -> list[Any]:
    """Everything that `tune` will launch, once each."""
    exact = dtype == torch.float32 and not tf32
    seen: dict[str, Any] = {}
    for desc, h, w in jobs:
        runner = make(desc, dtype, "cpu")
        for n in batches:
            for variant in _choices(runner, n, h, w, exact, sms, tf32):
                micros = functools.partial(_known_micros, known or {}, runner, variant[1], n, h, w, tf32)
                for i, option, choice in _one_by_one(variant, micros):
                    ops = variant[1]
                    at = i - isinstance(runner, Head)
                    key = f"{ops[at].key if at >= 0 else runner.key} {option}"
                    seen.setdefault(key, (desc, dtype, n, h, w, choice, i, tf32))
    return list(seen.values())


def _known_micros(
    known: Known,
    runner: Runner,
    ops: tuple[Op, ...],
    n: int,
    h: int,
    w: int,
    tf32: bool,
    i: int,
    option: Config,
) -> float:
    return known.get(_label(runner, ops, i, n, h, w, tf32, option), math.inf)


def fill_random(runner: Runner) -> None:
    """Packs weights of unit gain, so that timing runs on ordinary numbers."""
    if isinstance(runner, MobileMQA):
        mqa_tune.fill_random(runner)
        return
    for stage, p in runner.packed.items():
        fan = (1 if p.depthwise else p.c_in) * p.kernel**2
        shape = (p.c_out, 1 if p.depthwise else p.c_in, p.kernel, p.kernel)
        weight = (torch.randn(shape, device=runner.device) * fan**-0.5).to(runner.dtype)
        runner.pack(stage, weight)


def near_choices(
    runner: Runner, n: int, h: int, w: int, tf32: bool, entries: dict[str, Any], sms: int = 132
) -> list[Config]:
    """The formula's choice (bfloat16: where a table has none), and those that a table has for this block, for another
    dtype or another activation."""
    exact = runner.dtype == torch.float32 and not tf32
    if isinstance(runner, MobileMQA):
        first = mqa_config.formula(runner, n, h, w, int(tf32), sms)
    else:
        first = runner.by_formula(n, h, w, exact)
    out = [first]
    if exact:
        wide = [{**op, "j": op["j"] * 2, "warps": 8} if op["path"] == "pointwise" else op for op in first["ops"]]
        out += [{**first, "ops": wide}]
    else:
        for dtype in (str(runner.dtype).removeprefix("torch."), "float16"):
            for key in (runner.key, config.alike(runner.key)):
                found = config.lookup(entries, f"{dtype} {key}", n, h, w)
                if found is not None:
                    out.append({name: found[name] for name in ("fused", "chunk", "ops")})
        if runner.dtype == torch.bfloat16 and len(out) > 1:
            # same bytes, same tensor cores: what was the best in float16
            del out[0]
    return unique(out)


def _near_tasks(jobs: Sequence[Job], dtype: torch.dtype, batches: Sequence[int], tf32: bool, entries: Any) -> list[Any]:
    seen: dict[str, Any] = {}
    for desc, h, w in jobs:
        runner = make(desc, dtype, "cpu")
        for n in batches:
            for choice in near_choices(runner, n, h, w, tf32, entries):
                for i, op in enumerate(choice["ops"]):
                    seen.setdefault(f"{runner.key} {i} {op}", (desc, dtype, n, h, w, choice, i, tf32))
    return list(seen.values())


def _tune_near(runner: Runner, n: int, h: int, w: int, tf32: bool, entries: Any, log: Any) -> tuple[Config, float]:
    timed = _Timed(runner, n, h, w, tf32)
    sms = config.device_limits(runner.device.index or 0)[0]
    found: list[tuple[float, Config]] = []
    for choice in near_choices(runner, n, h, w, tf32, entries, sms):
        fitting = timed.fitting(choice)
        log(f"    {_whole(timed, fitting, found, log)} us {fitting}")
    if not found:
        raise RuntimeError(f"{runner.key} {n}x{h}x{w}: no candidate runs and is right")
    micros, choice = min(found, key=lambda item: item[0])
    return choice, micros


def tune(
    jobs: Sequence[Job],
    dtype: torch.dtype,
    batches: Sequence[int] = config.BUCKETS,
    *,
    tf32: bool = False,
    device: Any = "cuda",
    log: Callable[[str], None] = print,
    verbose: Callable[[str], None] = lambda _: None,
    workers: int | None = None,
    known: Known | None = None,
    near: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Entries of a table: {"dtype block key": {"NxHxW": choice with "us"}} for every job and batch.

    `workers` 0: nothing is compiled ahead. `known` holds times of an earlier run and takes up those of this one.
    `near`: instead of all candidates only what these entries hold for alike blocks, see `near_choices`.
    """
    known = {} if known is None else known
    device = torch.device(device, torch.cuda.current_device())
    sms = config.device_limits(device.index)[0]
    begin = time.perf_counter()
    if workers != 0:
        if near is None:
            tasks = tasks_for(jobs, dtype, batches, tf32, sms, known)
        else:
            tasks = _near_tasks(jobs, dtype, batches, tf32, near)
        for message in precompile(tasks, workers):
            verbose(f"compile: {message}")
        log(f"{len(tasks)} kernels compiled in {time.perf_counter() - begin:.0f} s")
    name = str(dtype).removeprefix("torch.") + ("_tf32" if tf32 else "")
    entries: dict[str, Any] = {}
    for desc, h, w in jobs:
        runner = make(desc, dtype, device)
        fill_random(runner)
        for n in batches:
            verbose(f"{name} {runner.key} {n}x{h}x{w}")
            if near is None:
                choice, micros = tune_block(runner, n, h, w, tf32=tf32, log=verbose, known=known)
            else:
                choice, micros = _tune_near(runner, n, h, w, tf32, near, verbose)
            entries.setdefault(f"{name} {runner.key}", {})[f"{n}x{h}x{w}"] = {**choice, "us": round(micros, 2)}
            log(f"{micros:9.2f} us  {name} {runner.key} {n}x{h}x{w}  {'fused' if choice['fused'] else ''}")
    return entries


__all__ = ["candidates", "graph_time", "precompile", "tune", "tune_block"]
