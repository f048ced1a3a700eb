"""The facts behind `mnv4-ops info`: what is installed, what was chosen, and why anything is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import mnv4_ops
from mnv4_ops import _native

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "triton",
    "numpy",
    "onnxruntime",
    "openvino",
    "executorch",
    "ai-edge-litert",
    "ncnn",
    "tensorrt",
)


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[dict[str, Any]]:
    """GPUs that torch sees: index, name, memory_bytes, capability, multiprocessors, driver of CUDA, tuned table."""
    import torch

    from mnv4_ops import tuning

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda,
                "tuned": tuning.describe(properties.name),
            }
        )
    return found


def _problems(native: dict[str, Any], gpus: list[dict[str, Any]], reason: str | None) -> list[str]:
    """What does not run fused here, each with its reason."""
    import torch

    problems = []
    if not native["loaded"]:
        problems.append(f"no native library, models run their original forwards: {native['reason']}")
    elif native["openmp_runtime"] is None and torch.get_num_threads() > 1:
        problems.append("no OpenMP runtime is loaded in this process: std::thread is used, which starts slower")
    if sys.platform == "win32":
        problems.append("Windows is not supported: models run their original forwards")
    if gpus and reason is not None:
        problems.append(f"no GPU kernels, models on a GPU run their original forwards: {reason}")
    elif any(gpu["capability"] == "9.0" for gpu in gpus):
        from mnv4_ops.triton_kernels import hopper

        lacking = hopper.unavailable()
        if lacking is not None:
            problems.append(f"Hopper's own kernels, attention blocks run by slower ones: {lacking}")
    if torch.backends.mps.is_available():
        problems.append("MPS is not supported: models on it run their original forwards")
    if package_version("timm") is None:
        problems.append("timm is not installed (`pip install 'mnv4-ops[timm]'`): only the reference modules are served")
    return problems


def collect() -> dict[str, Any]:
    """Everything `mnv4-ops info` shows, ready for JSON. Sizes in bytes; None: absent or unknown.

    Keys: version, python, platform, packages, native (loaded, file, reason, build, openmp_runtime),
    cpu (as `_core.cpu_info()`, None without the library), threads, gpus (as `gpus()`), gpu_kernels (why there are none,
    None if there are), environment, problems.
    """
    import torch

    from mnv4_ops.ops import cuda

    core = _native.core
    native: dict[str, Any] = {
        "loaded": core is not None,
        "file": None if core is None else core.__file__,
        "reason": _native.reason,
        "build": None if core is None else core.build_info(),
        "openmp_runtime": None if core is None else core.openmp_runtime(),
    }
    found, reason = gpus(), cuda.unavailable()
    return {
        "version": mnv4_ops.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "native": native,
        "cpu": None if core is None else core.cpu_info(),
        "threads": {
            "torch": torch.get_num_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "gpus": found,
        "gpu_kernels": reason,
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MNV4_OPS_")},
        "problems": _problems(native, found, reason),
    }
