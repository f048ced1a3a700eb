"""Mobile MQA on a GPU: correctness first, then measured tiles, then each block of the hybrids against its peers.

python benchmarks/gpu_mqa.py [--check] [--tune] [--bench] [--dtypes float16,...] [--batches 1,8,64,256] [--out DIR]
    [--table FILE]

Kernels are compiled by all cores first. `--bench` compiles the peers in one process a block (while the correctness
tests run), and measures the blocks one after another. `--table` holds tiles of an earlier `--tune`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from mnv4_ops.bench import gpu_mqa
from mnv4_ops.spec import MQASpec

START = time.perf_counter()


def say(*words: Any) -> None:
    print(f"== {time.perf_counter() - START:.0f} s:", *words, flush=True)


def describe(spec: MQASpec) -> dict[str, Any]:
    """Keywords of `MobileMQA`."""
    return {
        "c": spec.c, "heads": spec.heads, "key_dim": spec.key_dim, "value_dim": spec.value_dim,
        "kv_kernel": spec.kv_kernel, "kv_stride": spec.kv_stride, "query_stride": spec.query_stride,
        "query_norm": spec.query_stride > 1, "padding": spec.padding, "residual": spec.residual,
    }  # fmt: skip


def check_cases(
    dtypes: list[torch.dtype], batch: int
) -> list[tuple[str, MQASpec, torch.dtype, tuple[int, int, int], Any]]:
    from test_triton_mqa import hybrid_shapes
    from triton_mqa_cases import choices, spec

    cases = [
        (name, s, dtype, (batch, side, side), None) for name, (s, side) in hybrid_shapes().items() for dtype in dtypes
    ]
    odd = spec(c=152, heads=5, key_dim=48, value_dim=40, kv_stride=2)
    cases += [("odd", odd, dtype, (3, 13, 11), None) for dtype in dtypes]
    return cases + [(name, s, dtype, size, how) for name, (s, size, how) in choices().items() for dtype in dtypes]


def tasks_of(cases: list[Any]) -> list[Any]:
    from mnv4_ops.triton_kernels import tuner

    tasks = []
    for _, spec, dtype, size, choice in cases:
        desc = describe(spec)
        found = choice or tuner.make(desc, dtype, "cpu").choose(*size)
        tasks += [(desc, dtype, *size, found, i, False) for i in range(len(found["ops"]))]
    return tasks


def check(cases: list[Any]) -> int:
    """By the 2x rule; the number of failures."""
    from triton_mqa_cases import ATTENTION, MQACase, attention_inputs, run_attention, run_mqa, special_values

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    failed, worst = 0, {}

    def report(name: str, dtype: torch.dtype, run: Any) -> None:
        nonlocal failed
        try:
            fraction = max(run())
            worst[str(dtype)] = max(worst.get(str(dtype), 0.0), fraction)
            ok, text = fraction <= 1, f"{fraction:.3f} of the allowed error"
        except Exception as error:
            ok, text = False, f"{type(error).__name__}: {str(error)[:300]}"
        if not ok:
            failed += 1
            print(f"FAILED {name} {dtype}: {text}", flush=True)

    for name, spec, dtype, size, choice in cases:
        case = MQACase(spec, dtype, "cuda")
        block = case.build()
        block.choice = choice
        report(f"{name} {size}", dtype, lambda case=case, size=size, block=block: run_mqa(case, *size, block=block))
    shapes = [
        *ATTENTION,
        ((2, 8, 576, 144, 48, 48), "heads last", None),
        ((1, 4, 1024, 1024, 64, 64), "contiguous", None),
    ]
    for shape, layout, scale in shapes:
        for dtype in {case[2] for case in cases}:
            inputs = attention_inputs(shape, dtype, "cuda", layout)
            report(
                f"attention {shape} {layout}",
                dtype,
                lambda inputs=inputs, scale=scale: run_attention(*inputs, scale, 2),
            )
    try:
        special_values("cuda")
    except Exception as error:
        failed += 1
        print(f"FAILED special values: {type(error).__name__}: {str(error)[:300]}", flush=True)
    say(f"{len(cases)} blocks checked, {failed} failed, worst fractions", {k: round(v, 3) for k, v in worst.items()})
    return failed


def native_of(block: Any, spec: MQASpec, dtype: torch.dtype) -> Any:
    """The Triton block of a timm block."""
    from mnv4_ops.triton_kernels import tuner

    native = tuner.make(describe(spec), dtype, "cuda")

    def norm(bn: Any) -> tuple[Any, ...]:
        return (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)

    attn = block.attn
    native.pack(0, None, None, *norm(block.norm))
    native.pack(2, attn.query.proj.weight)
    for stage, branch in ((3, attn.key), (5, attn.value)):
        if spec.kv_stride > 1:
            native.pack(stage, branch.down_conv.weight, None, *norm(branch.norm))
        native.pack(stage + 1, branch.proj.weight)
    native.pack(7, attn.output.proj.weight, None, None, None, None, None, 0.0, block.layer_scale.gamma)
    return native


def bench_block(
    name: str, dtype: torch.dtype, batches: list[int], ready: Any, go: Any, turn: Any, results: Any
) -> None:
    """A process of its own: peers of all batches, then, in its turn, ours and the clock."""
    import warnings

    warnings.filterwarnings("ignore")
    spec, h, w = gpu_mqa.blocks()[name]
    with torch.inference_mode():
        block = gpu_mqa.timm_block(spec)
        cells = {}
        for batch in batches:
            cells[batch] = gpu_mqa.Cell(block, spec, batch, h, w, dtype, "cuda")
            cells[batch].peers()
        ready.release()
        table = json.loads(go.get()) if go is not None else {}
        with turn:
            native = native_of(cells[batches[0]].block, spec, dtype)
            for batch, cell in cells.items():
                sizes = table.get(f"{str(dtype).removeprefix('torch.')} {native.key}", {})
                native.choice = sizes.get(f"{batch}x{h}x{w}")
                out = torch.empty_like(cell.x)

                def run(cell: Any = cell, out: Any = out) -> Any:
                    native.run(cell.x, out)
                    return out

                cell.add(gpu_mqa.OURS, run)
                results.put({"block": name, "dtype": str(dtype), **cell.timed()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("check", "tune", "bench"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--dtypes", default="float16,bfloat16,float32")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--table")
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    dtypes = [getattr(torch, name) for name in args.dtypes.split(",")]
    batches = [int(b) for b in args.batches.split(",")]
    from mnv4_ops.triton_kernels import tuner

    jobs = [(describe(spec), h, w) for spec, h, w in gpu_mqa.blocks().values()]
    cases = check_cases(dtypes, 2) if args.check else []
    tasks = tasks_of(cases)
    if args.tune:
        tasks += tuner.tasks_for(jobs, dtypes[0], batches, False, 132)
    for message in tuner.precompile(tasks) if tasks else ():
        print("compile:", message, flush=True)
    say(f"{len(tasks)} kernels compiled")

    context = multiprocessing.get_context("spawn")
    names = list(gpu_mqa.blocks()) if args.bench else []
    ready, turn, results = context.Semaphore(0), context.Lock(), context.Queue()
    gates = [context.Queue() for _ in names]
    workers = [
        context.Process(target=bench_block, args=(name, dtypes[0], batches, ready, gate, turn, results), daemon=True)
        for name, gate in zip(names, gates, strict=True)
    ]
    for worker in workers:
        worker.start()
    failed = check(cases) if args.check else 0
    alive, limit = 0, time.perf_counter() + 150
    while alive < len(names) and time.perf_counter() < limit:
        alive += ready.acquire(timeout=2)
        if sum(worker.is_alive() for worker in workers) <= alive:
            break
    if names:
        say(f"peers of {alive} of {len(names)} blocks ready")
    entries: dict[str, Any] = json.loads(Path(args.table).read_text())["entries"] if args.table else {}
    if args.tune:
        known: dict[str, float] = {}
        with (out / "mqa_tune.log").open("w") as log:
            for job in jobs:
                # what is done is kept when time runs out
                entries |= tuner.tune(
                    [job], dtypes[0], batches, workers=0, known=known, log=say,
                    verbose=lambda text: print(text, file=log, flush=True),
                )  # fmt: skip
                (out / "mqa_tuned.json").write_text(json.dumps({"entries": entries}, indent=1))
        (out / "mqa_known.json").write_text(json.dumps(known))
    for gate in gates:
        gate.put(json.dumps(entries))
    cells = []
    deadline = time.perf_counter() + 150
    while len(cells) < alive * len(batches) and time.perf_counter() < deadline:
        try:
            cells.append(results.get(timeout=5))
        except Exception:
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        (out / "mqa_bench.json").write_text(json.dumps(cells, indent=1))
        cell = cells[-1]
        times = {name: round(us, 1) for name, us in cell["us"].items()}
        print(
            f"{cell['block']} b{cell['batch']}: {times} {cell.get('speedup', 0):.2f}x {cell['failed'] or ''}",
            flush=True,
        )
        if cell["batch"] == batches[0]:
            print("   SDPA:", cell["sdpa"], flush=True)
    say("done")
    for worker in workers:
        worker.terminate()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
