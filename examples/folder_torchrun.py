"""Offline classification of a folder of images on several ranks, one process each:

    torchrun --nproc-per-node 2 examples/folder_torchrun.py IMAGES OUTPUT

Each rank takes every n-th image and appends a line "name<TAB>class<TAB>probability" to OUTPUT/rank-R.tsv as soon as a
batch is done. What any earlier run has written is skipped: after a worker was killed, the same command does the rest.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import timm
import torch
from PIL import Image

import mnv4_ops

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def finished(output: Path) -> set[str]:
    """Names in complete lines: one that was cut off has no newline, and its image is done again."""
    lines = [line for path in output.glob("rank-*.tsv") for line in path.read_text().splitlines(keepends=True)]
    return {line.split("\t")[0] for line in lines if line.endswith("\n") and line.count("\t") == 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="mobilenetv4_conv_small.e2400_r224_in1k")
    parser.add_argument("--random-weights", action="store_true", help="no download, for a trial")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")

    mnv4_ops.enable()
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=not args.random_weights).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    names = sorted(path.name for path in args.images.iterdir() if path.suffix.lower() in SUFFIXES)
    done = finished(args.output) if args.output.exists() else set()
    mine = [name for name in names[rank::ranks] if name not in done]
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"rank-{rank}.tsv"
    cut = path.exists() and not path.read_text().endswith("\n") and path.stat().st_size > 0
    begin = time.perf_counter()
    with path.open("a") as out, torch.inference_mode():
        if cut:
            out.write("\n")
        for start in range(0, len(mine), args.batch):
            batch = mine[start : start + args.batch]
            x = torch.stack([transform(Image.open(args.images / name).convert("RGB")) for name in batch])
            best = model(x.to(device)).softmax(1).max(1)
            for name, index, value in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True):
                out.write(f"{name}\t{index}\t{value:.4f}\n")
            out.flush()
    print(f"rank {rank}: {len(mine)} images in {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
