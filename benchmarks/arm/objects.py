"""No instruction above a tier sits outside of that tier's object.

An instruction that the disassembler does not know when it is told what the tier has is above the tier.

    python benchmarks/arm/objects.py BUILD_DIRECTORY
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OBJDUMP = "llvm-objdump-19"
# what an object may use beyond ARMv8.0, by the name of its source
ABOVE = {"neon_fp16": "+fp16,+fullfp16", "neon_bf16": "+bf16"}


def unknown(path: Path) -> list[str]:
    """Instructions of an object that its tier does not have."""
    name = path.name.split(".")[0]
    features = ABOVE.get(name, "").replace("+fp16,", "")
    text = subprocess.run(
        [OBJDUMP, "-d", "--mcpu=generic", f"--mattr={features}" if features else "--mattr=+v8a", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [line.strip() for line in text.splitlines() if "<unknown>" in line]


def main(build: Path) -> int:
    objects = sorted(path for path in build.rglob("*.o") if "mnv4_core" in str(path))
    if not any(path.name.startswith("neon.") for path in objects):
        print(f"no object of the NEON tier under {build}")
        return 1
    wrong = {path.name: found for path in objects if (found := unknown(path))}
    print(f"{len(objects)} objects, {len(wrong)} with instructions above their tier")
    for name, found in wrong.items():
        print(name, *found[:5], sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
