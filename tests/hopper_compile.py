"""Compiles the kernels in Gluon for Hopper, which needs no GPU, and prints a line of JSON for each machine program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from mnv4_ops.spec import MQASpec

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
    found = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", words)
    moves = re.compile(r"(LDC R1,|(IADD3|VIADD|MOV|IMAD\.MOV\.U32) R1,)")
    return [
        line.strip() for line in found if re.search(r"\bR1\b", line) and "[R1" not in line and not moves.match(line)
    ]


def main() -> None:
    driver.set_active(Absent())
    from mnv4_ops.triton_kernels import hopper, mqa_config
    from triton_mqa_cases import MQACase

    hopper.available = lambda: True
    for name, (spec, side) in blocks().items():
        block = MQACase(spec, torch.float16, "cpu").build()
        for launch in block.plan(64, side, side, mqa_config.on_hopper(block, 64, side, side)).launches:
            compiled = launch.compile()
            words = listing(compiled.asm["cubin"])
            line = {
                "block": name, "kernel": compiled.name, "shared": compiled.metadata.shared,
                "products": words.count(" HGMMA."), "waits": words.count("WARPGROUP.DEPBAR"),
                "wrong": wrong_addresses(words),
            }  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
