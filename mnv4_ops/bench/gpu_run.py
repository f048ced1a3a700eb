"""The whole of `mnv4-ops bench --device cuda`: cells of (model, dtype, batch), each in its own process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mnv4_ops.bench import gpu, gpu_report, inputs, machine
from mnv4_ops.bench import peers as registry
from mnv4_ops.bench import run as cpu_run
from mnv4_ops.bench.errors import BenchError
from mnv4_ops.bench.run import Outcome

_METHOD = {
    "order": "all variants interleaved in one process, random order per round",
    "graphs": "every variant captured into a CUDA graph by the caller; per turn one warm-up replay, then five spans of "
    "replays of about 2 ms between two events; milliseconds per replay (cold_median_ms: L2 flushed before each)",
    "calls": "host wall clock of a call and torch.cuda.synchronize(); per turn one warm-up call, then 1 to 12 calls",
    "statistics": "median, 20 % and 80 % quantiles, minimum",
    "input": "on the device, channels_last (NCHW for timm eager NCHW); a graph reads it in place, "
    "enable(cuda_graphs=True) copies it",
    "compile": "torch.compile(fullgraph=True, dynamic=False) of the channels_last model",
    "gate": "2x rule against float64 in IEEE on the device (peers twice that); float32 runs with torch's own settings",
    "memory": "max_memory_allocated of one forward without the model's own weights, input and packed weights included",
}


@dataclass(frozen=True)
class GpuPlan:
    """What to measure: the product of models, dtypes and batches. `peers`: all, none, or names with commas."""

    models: list[str]
    batches: list[int]
    dtypes: list[str]
    peers: str = "all"
    image: str | None = None
    resolution: int | None = None
    rounds: int = 20
    seconds: float = 20.0

    def chosen(self) -> tuple[str, ...]:
        usual = [peer.name for peer in registry.GPU_PEERS if not peer.slow]
        return registry.named(self.peers, list(gpu.PEERS), {"all": usual}, " on a GPU")

    def validate(self) -> None:
        """Raises BenchError for what would only be found out in the middle."""
        from mnv4_ops.ops import cuda

        reason = cuda.unavailable()
        if reason is not None:
            raise BenchError(f"--device cuda: {reason}")
        self.chosen()
        if self.image is not None:
            inputs.photograph(self.image)
        for dtype in self.dtypes:
            if dtype not in gpu.DTYPES:
                raise BenchError(f"--dtype: expected one of {', '.join(gpu.DTYPES)}, got {dtype!r}")

    def cells(self) -> list[tuple[str, str, int]]:
        return [(m, d, b) for m in self.models for d in self.dtypes for b in self.batches]


def environment() -> dict[str, Any]:
    """Facts of the machine and its GPU that belong to every result."""
    from mnv4_ops import _info

    return {**machine.environment(), "gpu": next(iter(_info.gpus()), None)}


def models(plan: GpuPlan, console: Console, save: Callable[[dict[str, Any]], None] | None = None) -> Outcome:
    """One table per cell and a summary; `save` gets the document after each cell. `ok` is False when a gate was red or
    the enabled model could not run.
    """
    notes = cpu_run.weights(plan.models, console)
    threads = len(machine.available_cpus())
    cells: list[dict[str, Any]] = []
    document = gpu_report.document(environment(), _METHOD, cells)
    for model, dtype, batch in plan.cells():
        request = gpu.GpuRequest(
            model, batch, dtype, plan.resolution, plan.image, plan.chosen(), notes[model], plan.rounds, plan.seconds
        )
        title = f"{inputs.ledger_name(model)} {dtype} batch {batch}"
        try:
            result = cpu_run.run_cell(gpu.measure, request, title, console, threads, compilers=threads)
        except RuntimeError as error:
            raise BenchError(f"{title}: the measuring process failed: {str(error).splitlines()[-1]}") from error
        cells.append(result)
        if save is not None:
            save(document)
        if result["red"]:
            console.print(f"[bold red]red[/]: {gpu_report.title(result)}: {result['red']}; no speed is shown")
            continue
        console.print()
        console.print(gpu_report.cell_table(result))
        for note in gpu_report.cell_notes(result):
            console.print(f"  {note}", markup=False)
    for view in gpu_report.summary(cells):
        console.print()
        console.print(view)
    return Outcome(document, gpu_report.markdown(document), all(not cell["red"] for cell in cells))
