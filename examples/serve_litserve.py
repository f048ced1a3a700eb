"""A server with dynamic batching, by LitServe:

    python examples/serve_litserve.py --port 8000
    curl -X POST -H "Content-Type: application/json" -d '{"image": "<base64 of a JPEG>"}' http://127.0.0.1:8000/predict

Requests that come within `--wait` seconds share one call of the model, up to `--batch` of them.
"""

from __future__ import annotations

import argparse
import base64
import io
from typing import Any

import litserve
import timm
import torch
from PIL import Image
from torch import Tensor

import mnv4_ops


class Classifier(litserve.LitAPI):
    """Answers {"image": base64} with {"class": index, "probability": p}."""

    def __init__(self, name: str, pretrained: bool, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self.name, self.pretrained, self.threads = name, pretrained, threads

    def setup(self, device: str) -> None:
        """Once in each worker process."""
        mnv4_ops.enable()
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        self.model = timm.create_model(self.name, pretrained=self.pretrained).eval().to(device)
        config = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**config, is_training=False)

    def decode_request(self, request: dict[str, str], **_: Any) -> Tensor:
        return self.transform(Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB"))

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def predict(self, x: Tensor, **_: Any) -> list[dict[str, Any]]:
        with torch.inference_mode():
            best = self.model(x.to(self.device)).softmax(-1).max(-1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"class": index, "probability": value, "batch": len(x)} for index, value in pairs]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any], **_: Any) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenetv4_conv_small.e2400_r224_in1k")
    parser.add_argument("--random-weights", action="store_true", help="no download, for a trial")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8, help="at most so many images a call (at least 2)")
    parser.add_argument("--wait", type=float, default=0.005, help="seconds that a request waits for others")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    api = Classifier(
        args.model, not args.random_weights, args.threads, max_batch_size=args.batch, batch_timeout=args.wait
    )
    litserve.LitServer(api, accelerator="auto").run(host=args.host, port=args.port, generate_client_file=False)
