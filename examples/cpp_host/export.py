"""Writes a MobileNetV4 with the fused CPU kernels as a package of AOTInductor, for host.cpp or for Python:

python examples/cpp_host/export.py model.pt2
"""

from __future__ import annotations

import argparse

import timm
import torch

import mnv4_ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("--model", default="mobilenetv4_conv_small.e2400_r224_in1k")
    parser.add_argument("--random-weights", action="store_true", help="no download, for a trial")
    parser.add_argument("--size", type=int, default=224, help="rows and columns of an image")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=not args.random_weights).eval()
    images = torch.zeros(2, 3, args.size, args.size)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = mnv4_ops.export(model, (images,), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=args.package)


if __name__ == "__main__":
    main()
