"""What is measured: a timm model with its weights, and a real photograph through timm's own transform."""

from __future__ import annotations

import difflib
import importlib.util
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnv4_ops.bench.errors import BenchError

if TYPE_CHECKING:
    import torch
    from PIL import Image

PREFIX = "mobilenetv4_"
GROUPS = {
    "all-conv": ("conv_small", "conv_medium", "conv_large"),
    "all-hybrid": ("hybrid_medium", "hybrid_large"),
    "all": ("conv_small", "conv_medium", "conv_large", "hybrid_medium", "hybrid_large"),
}
PHOTOGRAPH = "astronaut (NASA, from scikit-image)"
_SEED = 0
_HUB_TIMEOUT = 3.0


def _timm() -> Any:
    if importlib.util.find_spec("timm") is None:
        raise BenchError("bench needs timm, which is not installed: pip install 'mnv4-ops[bench]'")
    import timm

    return timm


def resolve_models(names: list[str]) -> list[str]:
    """timm names for what the user wrote: with or without `mobilenetv4_` and a weights tag, or a group (all-conv,
    all-hybrid, all).
    """
    timm = _timm()
    known = timm.list_models(PREFIX + "*")
    found: list[str] = []
    for name in names:
        for part in GROUPS.get(name, (name,)):
            base = part.split(".")[0]
            full = part if timm.is_model(base) else PREFIX + part
            if not timm.is_model(full.split(".")[0]):
                candidates = [*known, *(k.removeprefix(PREFIX) for k in known), *GROUPS]
                close = difflib.get_close_matches(base, candidates, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)} and {', '.join(GROUPS)}"
                raise BenchError(f"--model: timm has no model {name!r}; {hint}")
            if full not in found:
                found.append(full)
    return found


def ledger_name(model: str) -> str:
    """Name of a timm model in `mnv4_ops.spec.ledger`."""
    return model.split(".")[0].removeprefix(PREFIX)


def pretrained_reachable(model: str) -> bool:
    """True if the weights lie in the local cache or their host answers within seconds."""
    timm = _timm()
    config = timm.get_pretrained_cfg(model)
    if config is None or not config.hf_hub_id:
        return False
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    if any(
        isinstance(try_to_load_from_cache(config.hf_hub_id, file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
    ):
        return True
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{config.hf_hub_id}/resolve/main/config.json"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_TIMEOUT):
            return True
    except (OSError, ValueError):
        return False


def load_model(name: str, *, pretrained: bool) -> torch.nn.Module:
    """A timm model in eval mode. Without `pretrained`: seeded random weights, BatchNorms and layer scales."""
    import torch

    timm = _timm()
    if pretrained:
        return timm.create_model(name, pretrained=True).eval()
    from mnv4_ops.reference import randomize_

    torch.manual_seed(_SEED)
    model = timm.create_model(name, pretrained=False).eval()
    randomize_(model, seed=_SEED)
    return model


def fetch_weights(name: str) -> str | None:
    """Downloads (or finds in the cache) the pretrained weights. None if that worked, otherwise why not."""
    if not pretrained_reachable(name):
        return "the pretrained weights could not be reached"
    try:
        _timm().create_model(name, pretrained=True)
    except Exception as error:  # hub libraries raise anything from OSError to their own types
        return f"the pretrained weights could not be loaded ({type(error).__name__})"
    return None


def photograph(path: str | None) -> Image.Image:
    """The image at `path`, or the astronaut that ships inside scikit-image's wheel. RGB."""
    from PIL import Image, UnidentifiedImageError

    if path is not None:
        if not Path(path).is_file():
            raise BenchError(f"--image: expected an image file, got {path!r}, which is no file")
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except UnidentifiedImageError:
            raise BenchError(
                f"--image: expected a photograph (JPEG, PNG, ...), but {path!r} is no image that Pillow can read"
            ) from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BenchError(f"--image: {path!r} cannot be read as an image: {error}") from None
    if importlib.util.find_spec("skimage") is None:
        raise BenchError(
            "no photograph: give --image FILE, or pip install 'mnv4-ops[bench]' for the one in scikit-image"
        )
    from skimage import data

    return Image.fromarray(data.astronaut())


def resolution_of(name: str, resolution: int | None) -> int:
    """Side in pixels: the one given, or the training resolution that timm states for the model."""
    if resolution is not None:
        return resolution
    config = _timm().get_pretrained_cfg(name)
    return int((config.input_size if config is not None else (3, 224, 224))[-1])


def photo_batch(image: Image.Image, model: torch.nn.Module, *, batch: int, resolution: int) -> torch.Tensor:
    """float32 [batch, 3, resolution, resolution], contiguous: timm's evaluation transform of the photograph.

    Image 0 is the photograph itself; the further ones are windows of it, shifted and mirrored, so that no two are
    alike.
    """
    import torch
    from PIL.Image import Transpose
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({"input_size": (3, resolution, resolution)}, model=model)
    transform = create_transform(**config, is_training=False)
    images = []
    for index in range(batch):
        picture = image
        if index:
            step = index / batch * 0.2
            left, top = step * image.width, step * image.height
            picture = image.crop((round(left), round(top), image.width, image.height))
            if index % 2:
                picture = picture.transpose(Transpose.FLIP_LEFT_RIGHT)
        images.append(transform(picture))
    return torch.stack(images).contiguous()


def label_of(name: str, index: int) -> str:
    """Name of an ImageNet-1k class, for pretrained models."""
    try:
        from timm.data import ImageNetInfo

        return ImageNetInfo("imagenet-1k").index_to_description(index)
    except Exception:  # only decoration
        return f"class {index}"
