"""The layers of layers.json as .tflite files, for XNNPACK. Needs tensorflow (any machine).

python benchmarks/arm/xnnpack_models.py DIRECTORY [MODEL...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

ACTS = {"none": None, "relu": "relu", "relu6": tf.nn.relu6, "gelu": "gelu"}
Layers = tf.keras.layers


def _step(x: Any, kind: str, kernel: int, stride: int, channels: int, act: str) -> Any:
    if stride == 2:  # symmetric padding, as in PyTorch
        x = Layers.ZeroPadding2D(kernel // 2)(x)
    padding = "valid" if stride == 2 else "same"
    noise = tf.keras.initializers.RandomNormal(stddev=0.05)
    if kind == "depthwise":
        return Layers.DepthwiseConv2D(kernel, stride, padding, activation=ACTS[act], depthwise_initializer=noise)(x)
    return Layers.Conv2D(channels, kernel, stride, padding, activation=ACTS[act], kernel_initializer=noise)(x)


def _attention(x: Any, graph: dict[str, Any]) -> Any:
    """As good a graph as there is: all heads share keys and values, so that their queries are rows of one product and
    nothing is transposed; scales, and norms where they may, are in the weights."""
    heads, key_dim, value_dim, stride = (graph[k] for k in ("heads", "key_dim", "value_dim", "kv_stride"))
    h, w, c = graph["input"]

    def rows(y: Any, dim: int) -> Any:
        return Layers.Reshape((-1, dim))(y)

    y = x
    if stride > 1:  # before zero padding the norm does not fold
        y = Layers.BatchNormalization()(x)
    sides = []
    for dim in (key_dim, value_dim):
        side = _step(y, "depthwise", graph["kv_kernel"], stride, c, "none") if stride > 1 else x
        sides.append(rows(_step(side, "conv", 1, 1, dim, "none"), dim))
    # the norm is in these weights as well
    query = rows(_step(x, "conv", 1, 1, heads * key_dim, "none"), key_dim)
    scores = Layers.Lambda(lambda t: tf.linalg.matmul(t[0], t[1], transpose_b=True))([query, sides[0]])
    out = Layers.Lambda(lambda t: tf.linalg.matmul(t[0], t[1]))([Layers.Softmax()(scores), sides[1]])
    out = _step(Layers.Reshape((h, w, heads * value_dim))(out), "conv", 1, 1, c, "none")
    return Layers.Add()([out, x]) if graph["residual"] else out


def _graph(x: Any, graph: dict[str, Any]) -> Any:
    if "heads" in graph:
        return _attention(x, graph)
    y = x
    for step in graph["steps"]:
        y = _step(y, *step)
    return Layers.Add()([y, x]) if graph["residual"] else y


def save(inputs: Any, outputs: Any, path: Path) -> None:
    model = tf.keras.Model(inputs, outputs)
    for variable in model.weights:  # biases that are not zero, norms that are not the identity
        if len(variable.shape) == 1:
            noise = np.random.default_rng(0).normal(size=variable.shape).astype(np.float32) * 0.1
            variable.assign(np.abs(noise) + 0.5 if variable.name.endswith("variance") else noise)
    path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def main(folder: Path, chosen: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    models = json.loads((Path(__file__).parent / "layers.json").read_text())
    for model in chosen or models:
        parts = models[model]
        by_line = {}
        for i, layer in enumerate(parts["layers"].values()):
            by_line[layer["line"]] = layer["graph"]
            x = tf.keras.Input(layer["graph"]["input"], batch_size=1)
            save(x, _graph(x, layer["graph"]), folder / f"{model}-{i:02d}.tflite")
        if not parts["model"]:
            continue
        *blocks, head = parts["model"]
        x = y = tf.keras.Input(by_line[blocks[0]]["input"], batch_size=1)
        for line in blocks:
            y = _graph(y, by_line[line])
        _, _, c_feat, c_hidden, classes, *_ = head.split()
        y = _step(y, "conv", 1, 1, int(c_feat), "relu")
        y = Layers.GlobalAveragePooling2D(keepdims=True)(y)
        y = _step(y, "conv", 1, 1, int(c_hidden), "relu")
        y = Layers.Dense(int(classes))(Layers.Flatten()(y))
        save(x, y, folder / f"{model}-model.tflite")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
