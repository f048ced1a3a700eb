"""Offline classification of a folder of images with Ray Data, one model in each actor of a pool:

    python examples/folder_ray.py IMAGES OUTPUT --workers 2

Writes CSV files with the columns name, class, probability to OUTPUT. Ray starts an actor that died again and gives its
images to the others, so that none is lost. On GPUs: `--workers` as many as there are, and `num_gpus=1` below.
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import ray
import timm
import torch
from PIL import Image

import mnv4_ops


class Classify:
    """An actor: the model is made once, then called with batches of {"bytes", "path"}."""

    def __init__(self, name: str, pretrained: bool) -> None:
        mnv4_ops.enable()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = timm.create_model(name, pretrained=pretrained).eval()
        config = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**config, is_training=False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = [self.transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in batch["bytes"]]
        with torch.inference_mode():
            best = self.model(torch.stack(images)).softmax(1).max(1)
        names = np.array([Path(path).name for path in batch["path"]])
        return {"name": names, "class": best.indices.numpy(), "probability": best.values.numpy()}


def run(images: Path, output: Path, args: argparse.Namespace, actor: type = Classify) -> None:
    if "RAY_ADDRESS" not in os.environ:
        # one more than the actors take, for reading and writing
        ray.init(num_cpus=args.workers + 1, include_dashboard=False)
    data = ray.data.read_binary_files(str(images), include_paths=True, override_num_blocks=4 * args.workers)
    found = data.map_batches(
        actor,
        fn_constructor_args=(args.model, not args.random_weights),
        batch_size=args.batch,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=1,
    )
    found.write_csv(str(output))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="mobilenetv4_conv_small.e2400_r224_in1k")
    parser.add_argument("--random-weights", action="store_true", help="no download, for a trial")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="actors, each on one CPU")
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    run(args.images, args.output, args)
