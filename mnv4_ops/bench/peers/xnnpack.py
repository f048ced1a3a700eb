"""XNNPACK called directly: the traced module with BN folded becomes one NHWC subgraph. The library is executorch's."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from mnv4_ops.bench.peers import _xnn
from mnv4_ops.bench.peers.base import Peer, Unsupported

_INF = float("inf")
_CLAMPS: dict[type, tuple[float, float]] = {nn.ReLU: (0.0, _INF), nn.ReLU6: (0.0, 6.0)}
_PASS = (nn.Identity, nn.Dropout)
_LAYER_SCALES = ("LayerScale", "LayerScale2d")  # this package's and timm's
_ATTENTION = ("MultiQueryAttention", "MultiQueryAttention2d")


class _Tracer(fx.Tracer):
    """Keeps what the lowering knows as one node; takes blocks, containers and attention apart."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        names = ("SelectAdaptivePool2d", *_ATTENTION)
        return isinstance(m, known) or type(m).__name__ in names or not list(m.children())


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float32).numpy()


def _fold(
    conv: nn.Conv2d, norm: nn.BatchNorm2d | None, gamma: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of conv followed by norm and layer scale, in float64."""
    weight = conv.weight.double()
    bias = None if conv.bias is None else conv.bias.double()
    if norm is not None:
        weight, bias = _fold_norm(weight, bias, norm)
    if gamma is not None:
        weight = weight * gamma.double().view(-1, 1, 1, 1)
        bias = None if bias is None else bias * gamma.double()
    return weight, bias


def _norm_affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a BatchNorm, in float64."""
    scale, shift = _fold_norm(torch.ones(norm.num_features, 1, 1, 1, dtype=torch.float64), None, norm)
    assert shift is not None
    return scale.flatten(), shift


def _fold_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.BatchNorm2d
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if norm.running_mean is None or norm.running_var is None or norm.weight is None:
        raise Unsupported("BatchNorm without affine parameters or running statistics")
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return weight * scale.view(-1, 1, 1, 1), shift if bias is None else shift + bias * scale


def _activation(module: nn.Module) -> nn.Module | None:
    """The activation inside timm's BatchNormAct2d, or None."""
    act = getattr(module, "act", None)
    return None if act is None or isinstance(act, nn.Identity) else act


def _is_gelu(module: nn.Module | None) -> bool:
    """The erf form, torch's module or timm's."""
    return type(module).__name__ == "GELU" and getattr(module, "approximate", "none") == "none"


def _pools_everything(module: nn.Module) -> bool:
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    return type(module).__name__ == "SelectAdaptivePool2d" and getattr(module, "pool_type", None) == "avg"


class _Lowering:
    """Walks the traced nodes in order; values of nodes are ids of the subgraph."""

    def __init__(self, module: nn.Module, example: torch.Tensor) -> None:
        self.module = module
        self.traced = _Tracer().trace(module)
        self.modules = dict(module.named_modules())
        self.graph = _xnn.Subgraph()
        self.values: dict[fx.Node, int] = {}
        self.norms: dict[fx.Node, nn.BatchNorm2d] = {}  # before an attention
        self.example = example

    def run(self) -> int:
        """Id of the output value."""
        nodes = list(self.traced.nodes)
        (output,) = (node for node in nodes if node.op == "output")
        self.final = self._source(output.args[0])
        for node in nodes:
            if node in self.values or node.op in ("output", "get_attr"):
                continue
            if node.op == "placeholder":
                n, c, h, w = self.example.shape
                self.values[node] = self.graph.input((n, h, w, c))
            elif node.op == "call_module":
                self._module(node, self.modules[str(node.target)])
            elif node.target in (operator.add, operator.iadd, torch.add):
                a, b = (self.values[argument] for argument in node.args[:2])
                self.values[node] = self.graph.add(a, b, last=node is self.final)
            elif node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
                self._flatten(node)
            elif node.users:
                raise Unsupported(f"{node.op} {node.target} is not lowered to XNNPACK")
        return self.values[self.final]

    def _source(self, node: Any) -> fx.Node:
        """The node that really computes `node`, looking through modules that do nothing at inference."""
        while node.op == "call_module" and isinstance(self.modules[str(node.target)], _PASS):
            node = node.args[0]
        return node

    def _only_user(self, node: fx.Node) -> tuple[fx.Node, nn.Module] | None:
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_module":
            return users[0], self.modules[str(users[0].target)]
        return None

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        x = self.values[node.args[0]]  # type: ignore[index]
        last = node is self.final
        if isinstance(module, nn.Conv2d):
            self._convolution(node, module, x)
        elif isinstance(module, nn.Linear):
            bias = None if module.bias is None else _numpy(module.bias)
            self.values[node] = self.graph.linear(x, _numpy(module.weight), bias, last=last)
        elif isinstance(module, _PASS):
            self.values[node] = x
        elif isinstance(module, nn.Flatten):
            self._flatten(node)
        elif type(module).__name__ in _LAYER_SCALES:
            self.values[node] = self.graph.multiply(x, _numpy(module.get_parameter("gamma")), last=last)
        elif _pools_everything(module):
            self.values[node] = self.graph.mean_hw(x, last=last)
        elif type(module) in _CLAMPS:
            self.values[node] = self.graph.clamp(x, *_CLAMPS[type(module)], last=last)
        elif _is_gelu(module):
            self.values[node] = self.graph.gelu(x, last=last)
        elif isinstance(module, nn.BatchNorm2d):
            self._pre_norm(node, module, x)
        elif type(module).__name__ in _ATTENTION:
            self._attention(node, module, x)
        else:
            raise Unsupported(f"{type(module).__name__} is not lowered to XNNPACK")

    def _pre_norm(self, node: fx.Node, norm: nn.BatchNorm2d, x: int) -> None:
        follower = self._only_user(node)
        if follower is None or type(follower[1]).__name__ not in _ATTENTION or _activation(norm) is not None:
            raise Unsupported("BatchNorm without a convolution before it, but for attention, is not lowered to XNNPACK")
        self.norms[follower[0]] = norm
        self.values[node] = x

    def _attention(self, node: fx.Node, attn: Any, x: int) -> None:
        """Query heads are rows of one product, so that nothing is transposed. The norm before it folds into every
        projection that reads it, the scale into the queries, the layer scale into the output.
        """
        graph, norm = self.graph, self.norms.get(node)
        heads = attn.spec.heads if hasattr(attn, "spec") else attn.num_heads
        if "down_pool" in attn.query._modules:
            raise Unsupported("attention of pooled queries is not lowered to XNNPACK")
        scale, shift = (None, None) if norm is None else _norm_affine(norm)
        n, h, w, _ = graph.shapes[x]

        def projection(y: int, conv: nn.Conv2d, folded: bool, factor: float = 1.0, gamma: Any = None) -> int:
            weight = conv.weight.double().flatten(1) * factor
            bias = None if conv.bias is None else conv.bias.double() * factor
            if folded and scale is not None and shift is not None:
                bias = weight @ shift + (0 if bias is None else bias)
                weight = weight * scale
            if gamma is not None:
                weight, bias = weight * gamma.double()[:, None], None if bias is None else bias * gamma.double()
            array = _numpy(weight[:, None, None, :])
            shift_array = None if bias is None else _numpy(bias)
            return graph.convolution(y, array, shift_array, stride=1, pads=(0, 0, 0, 0), depthwise=False)

        def down(y: int, branch: Any) -> int:
            conv, (vertical, horizontal) = branch.down_conv, branch.down_conv.padding
            weight, bias = _fold(conv, branch.norm, None)
            assert bias is not None
            pads = (vertical, horizontal, vertical, horizontal)
            array = _numpy(weight.permute(1, 2, 3, 0))
            return graph.convolution(y, array, _numpy(bias), stride=conv.stride[0], pads=pads, depthwise=True)

        strided = "down_conv" in attn.key._modules
        y = x
        if strided and scale is not None and shift is not None:
            # zeros are padded after the norm
            y = graph.add_constant(graph.multiply(x, _numpy(scale)), _numpy(shift))
        key, value = (
            projection(down(y, b), b.proj, False) if strided else projection(x, b.proj, True)
            for b in (attn.key, attn.value)
        )
        key_dim, value_dim = graph.shapes[key][3], graph.shapes[value][3]
        keys = graph.shapes[key][1] * graph.shapes[key][2]
        query = projection(x, attn.query.proj, True, key_dim**-0.5)
        query = graph.reshape(query, (n, h * w * heads, key_dim))
        scores = graph.matmul(query, graph.reshape(key, (n, keys, key_dim)), transpose_b=True)
        out = graph.matmul(graph.softmax(scores), graph.reshape(value, (n, keys, value_dim)))
        out = graph.reshape(out, (n, h, w, heads * value_dim))
        end, gamma = node, None
        follower = self._only_user(node)
        if follower and type(follower[1]).__name__ in _LAYER_SCALES:
            end, gamma = follower[0], follower[1].get_parameter("gamma")
        if self.final in (node, end):
            raise Unsupported("attention as the last layer is not lowered to XNNPACK")
        self.values[node] = self.values[end] = projection(out, attn.output.proj, False, gamma=gamma)

    def _flatten(self, node: fx.Node) -> None:
        x = self.values[node.args[0]]  # type: ignore[index]
        n, h, w, c = self.graph.shapes[x]
        if (h, w) != (1, 1):
            raise Unsupported("flatten of a map larger than 1 x 1")
        self.values[node] = self.graph.reshape(x, (n, c), last=node is self.final)

    def _convolution(self, node: fx.Node, conv: nn.Conv2d, x: int) -> None:
        """Takes a following BatchNorm and activation into the convolution."""
        depthwise = conv.groups > 1
        if depthwise and not conv.groups == conv.in_channels == conv.out_channels:
            raise Unsupported("grouped convolution that is not depthwise")
        if isinstance(conv.padding, str) or conv.dilation != (1, 1) or conv.stride[0] != conv.stride[1]:
            raise Unsupported(
                f"convolution with padding {conv.padding}, dilation {conv.dilation}, stride {conv.stride}"
            )
        end, norm, act, gamma = node, None, None, None
        follower = self._only_user(end)
        if follower and isinstance(follower[1], nn.BatchNorm2d):
            end, norm = follower
            act = _activation(norm)
            follower = self._only_user(end)
        chain = [node, end]
        if act is None:
            while follower and isinstance(follower[1], _PASS):
                end = follower[0]
                chain.append(end)
                follower = self._only_user(end)
            if follower and type(follower[1]).__name__ in _LAYER_SCALES:
                end, gamma = follower[0], follower[1].gamma
            elif follower and (type(follower[1]) in _CLAMPS or _is_gelu(follower[1])):
                end, act = follower
        weight, bias = _fold(conv, norm, gamma)  # type: ignore[arg-type]
        clamp = _CLAMPS.get(type(act), (-_INF, _INF))
        separate = act is not None and type(act) not in _CLAMPS
        if separate and not _is_gelu(act):
            raise Unsupported(f"{type(act).__name__} is not lowered to XNNPACK")
        last = self.final in (*chain, end)
        vertical, horizontal = conv.padding
        y = self.graph.convolution(
            x,
            _numpy(weight.permute(1, 2, 3, 0) if depthwise else weight.permute(0, 2, 3, 1)),
            None if bias is None else _numpy(bias),
            stride=conv.stride[0],
            pads=(vertical, horizontal, vertical, horizontal),
            depthwise=depthwise,
            clamp=clamp,
            last=last and not separate,
        )
        if separate:
            y = self.graph.gelu(y, last=last)
        for covered in (*chain, end):
            self.values[covered] = y


def _multi_query(model: nn.Module, example: tuple[torch.Tensor, ...], threads: int) -> Callable[[], Any]:
    """Attention with one key and one value head: the query heads are rows of one product."""
    if type(model).__name__ != "MultiQuery":
        raise Unsupported(f"{type(model).__name__} of {len(example)} inputs is not lowered to XNNPACK")
    q, k, v = example
    n, heads, queries, dim = q.shape
    graph = _xnn.Subgraph(inputs=3)
    rows = (n, heads * queries, dim)
    value_of = [graph.input(shape, i) for i, shape in enumerate((rows, (n, *k.shape[2:]), (n, *v.shape[2:])))]
    scaled = graph.multiply(value_of[0], np.full(1, dim**-0.5, np.float32))
    weights = graph.softmax(graph.matmul(scaled, value_of[1], transpose_b=True))
    out = graph.shapes[graph.matmul(weights, value_of[2], last=True)]
    arrays = [q.reshape(rows).numpy(), k[:, 0].numpy(), v[:, 0].numpy()]
    runtime = _xnn.Runtime(graph, arrays, out, threads)
    result = runtime.output.reshape(n, heads, queries, -1)

    def run() -> Any:
        runtime.invoke()
        return result

    return run


class Xnnpack(Peer):
    name = "xnnpack"
    label = "XNNPACK"
    requires = ("executorch",)
    order = 70
    several_inputs = True

    def available(self) -> str | None:
        if _xnn.library_folder() is not None:
            return None
        return "no XNNPACK library: pip install --no-deps executorch (Linux and macOS wheels carry it)"

    def prepare(self, model: nn.Module, example: Any, threads: int) -> Callable[[], Any]:
        if isinstance(example, tuple):
            return _multi_query(model, example, threads)
        lowering = _Lowering(model, example)
        output = lowering.run()
        shape = lowering.graph.shapes[output]
        runtime = _xnn.Runtime(lowering.graph, [example.permute(0, 2, 3, 1).numpy()], shape, threads)
        # a view: the caller gets NCHW order without a copy
        result = runtime.output.transpose(0, 3, 1, 2) if len(shape) == 4 else runtime.output
        invoke = runtime.invoke

        def run() -> Any:
            invoke()
            return result

        return run
