"""Compiles kernels in Gluon and a stem for Hopper, which needs no GPU: a line of JSON for each machine program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from mnv4_ops.spec import MQASpec

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);")
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Absent:
    """What the compiler asks a driver, answered for a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda


def blocks() -> dict[str, tuple[MQASpec, int]]:
    """(spec, side) of what is compiled: the hybrids' blocks at full resolution, heads of few and of odd size."""
    return {
        "16x16x160": (MQASpec(c=160, heads=4, key_dim=64, value_dim=64, kv_stride=2), 16),
        "24x24x192": (MQASpec(c=192, heads=8, key_dim=48, value_dim=48, kv_stride=2), 24),
        "8x8x256": (MQASpec(c=256, heads=4, key_dim=64, value_dim=64), 8),
        "12x12x512": (MQASpec(c=512, heads=8, key_dim=64, value_dim=64), 12),
        "10x10x96": (MQASpec(c=96, heads=2, key_dim=40, value_dim=56, residual=False), 10),
    }


def listing(cubin: bytes) -> str:
    """The machine program in words."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOL, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def wrong_addresses(words: str) -> list[str]:
    """Instructions that compute with R1, the stack pointer, other than moving it or addressing the stack."""
    found = INSTRUCTION.findall(words)
    moves = re.compile(r"(LDC R1,|(IADD3|VIADD|MOV|IMAD\.MOV\.U32) R1,)")
    return [
        line.strip() for line in found if re.search(r"\bR1\b", line) and "[R1" not in line and not moves.match(line)
    ]


def launches() -> Iterator[tuple[str, Any]]:
    """(name of the block, kernel of it): the blocks above, and a stem as the tables have it."""
    from mnv4_ops.triton_kernels import Block, mqa_config
    from triton_mqa_cases import MQACase

    for name, (spec, side) in blocks().items():
        block = MQACase(spec, torch.float16, "cpu").build()
        for launch in block.plan(64, side, side, mqa_config.on_hopper(block, 64, side, side)).launches:
            yield name, launch
    stem = {"c_in": 3, "c_mid": 32, "c_out": 32, "expand": True, "expand_kernel": 3, "expand_stride": 2}
    tile = {"path": "dense", "p": 128, "k": 32, "m0": 32, "m1": 0, "n0": 32, "n1": 0, "warps": 4, "stages": 3}
    block = Block(dtype=torch.float16, device="cpu", expand_act="relu", **stem)
    yield "stem", block.plan(64, 224, 224, {"fused": 0, "ops": [tile]}, False).launches[0]


def main() -> None:
    driver.set_active(Absent())
    from mnv4_ops.triton_kernels import hopper

    hopper.available = lambda: True
    for name, launch in launches():
        compiled = launch.compile()
        words = listing(compiled.asm["cubin"])
        line = {
            "block": name, "kernel": compiled.name, "shared": compiled.metadata.shared,
            "products": words.count(" HGMMA."), "waits": words.count("WARPGROUP.DEPBAR"),
            "instructions": len(INSTRUCTION.findall(words)), "wrong": wrong_addresses(words),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
