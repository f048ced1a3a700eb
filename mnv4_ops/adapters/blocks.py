"""Stages put together to the fused ops: the arithmetic is the same whatever library the modules come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mnv4_ops.spec import ConvSpec, FusedIBSpec, HeadSpec, MQASpec, Spec, UIBSpec

from .layers import ABSENT, Family, Stage, bare_norm, conv, doubling, norm, padding_of, sequence
from .record import Call, Part, Recipe, Recorder, Unsupported

# the stages of a model's head but its classifier, read from the modules of one library
Hidden = Callable[[Recorder], Stage]


def _part(rec: Recorder, node: int, slot: str, spec: Spec, op: str, params: list, eps: list, *args: object) -> Part:
    return Part(node, slot, rec.path(node) if slot == "block" else slot, spec, op, params, eps, args)


def _spec(rec: Recorder, node: int, cls: type, *args: object, **fields: object) -> Spec:
    try:
        return cls(*args, **fields)
    except (TypeError, ValueError) as error:
        raise Unsupported(f"{rec.path(node) or 'block'}: {error}") from None


def _params(*stages: Stage | None) -> tuple[list[Tensor | None], list[float]]:
    params: list[Tensor | None] = []
    for s in stages:
        params += ABSENT if s is None else s.params
    return params, [0.0 if s is None else s.eps for s in stages]


def _plain_act(rec: Recorder, node: int, stage: Stage | None, name: str) -> None:
    if stage is not None and stage.act != "none":
        raise Unsupported(f"{rec.path(node, name)}: an activation ({stage.act}) here has no kernel")


def uib(
    rec: Recorder,
    node: int,
    start: Stage | None,
    expand: Stage,
    mid: Stage | None,
    project: Stage,
    gamma: Tensor | None,
    residual: bool,
) -> Part:
    for name, stage in (("dw_start", start), ("dw_mid", mid)):
        if stage is not None and not stage.depthwise:
            raise Unsupported(f"{rec.path(node, name)}: a convolution of {stage.groups} groups has no kernel here")
    for name, stage in (("pw_exp", expand), ("pw_proj", project)):
        if (stage.kernel, stage.stride, stage.groups) != (1, 1, 1):
            raise Unsupported(f"{rec.path(node, name)}: only a 1x1 convolution has a kernel here")
    _plain_act(rec, node, start, "dw_start")
    _plain_act(rec, node, project, "pw_proj")
    if start is not None and mid is not None and start.stride != 1:
        raise Unsupported(f"{rec.path(node, 'dw_start')}: stride {start.stride} before a mid depthwise has no kernel")
    if mid is not None and mid.act != expand.act:
        raise Unsupported(f"{rec.path(node, 'dw_mid')}: activations {expand.act} and {mid.act} in one block")
    stride = (mid or start or expand).stride
    padding = padding_of(rec, node, start, mid)
    kernels = start.kernel if start else 0, mid.kernel if mid else 0
    channels = expand.c_in, expand.c_out, project.c_out
    spec = _spec(
        rec, node, UIBSpec, *channels, *kernels, stride, expand.act, padding, residual, layer_scale=gamma is not None
    )
    params, eps = _params(start, expand, mid, project)
    return _part(rec, node, "block", spec, "uib", [*params, gamma], eps, stride, padding, expand.act, residual)


def fused_ib(rec: Recorder, node: int, expand: Stage, project: Stage, residual: bool) -> Part:
    if expand.groups != 1:
        raise Unsupported(f"{rec.path(node, 'conv_exp')}: {expand.groups} groups have no kernel")
    if (project.kernel, project.stride, project.groups) != (1, 1, 1):
        raise Unsupported(f"{rec.path(node, 'conv_pwl')}: only a 1x1 convolution has a kernel here")
    _plain_act(rec, node, project, "bn2")
    padding = padding_of(rec, node, expand)
    spec = _spec(
        rec, node, FusedIBSpec, expand.c_in, expand.c_out, project.c_out,
        expand.kernel, expand.stride, expand.act, padding, residual,
    )  # fmt: skip
    params, eps = _params(expand, project)
    return _part(
        rec, node, "block", spec, "fused_ib", [*params, None], eps, expand.stride, padding, expand.act, residual
    )


def conv_bn_act(rec: Recorder, node: int, stage: Stage, slot: str = "block") -> Part:
    if stage.groups != 1:
        raise Unsupported(f"{rec.path(node, 'conv')}: {stage.groups} groups have no kernel")
    padding = padding_of(rec, node, stage)
    spec = _spec(rec, node, ConvSpec, stage.c_in, stage.c_out, stage.kernel, stage.stride, stage.act, padding)
    params, eps = _params(stage)
    return _part(rec, node, slot, spec, "conv_bn_act", params, eps, stage.stride, padding, stage.act)


@dataclass
class Attention:
    """The stages of an attention block; the depthwise ones are None without a stride of keys and values."""

    query: Stage
    key: Stage
    value: Stage
    output: Stage
    query_norm: Stage | None = None
    key_down: Stage | None = None
    value_down: Stage | None = None
    heads: int = 1
    query_stride: int = 1
    padding: str | None = None  # of the pool of the queries


def attention(
    rec: Recorder, node: int, heads: int, family: Family, pool: Callable[[Recorder, int], str | None]
) -> Attention:
    """The four branches `query`, `key`, `value`, `output` of an attention module. `pool` checks the pool of the queries
    and says its padding.
    """
    rec.evaluating(node)

    def only(names: dict[str, int], what: str, *allowed: tuple[str, ...]) -> None:
        if tuple(names) not in allowed:
            raise Unsupported(f"{rec.path(node, what)}: layers {', '.join(names)} have no kernel")

    found: dict[str, Any] = {}
    names = sequence(rec, node, "query")
    only(names, "query", ("proj",), ("down_pool", "norm", "proj"))
    pooled = "down_pool" in names
    padding = pool(rec, names["down_pool"]) if pooled else None
    query_norm = bare_norm(rec, names["norm"], family) if pooled else None
    query = conv(rec, names["proj"], family)
    for branch in ("key", "value"):
        names = sequence(rec, node, branch)
        only(names, branch, ("proj",), ("down_conv", "norm", "proj"))
        down = "down_conv" in names
        found[f"{branch}_down"] = (
            norm(rec, names["norm"], family, conv(rec, names["down_conv"], family)) if down else None
        )
        found[branch] = conv(rec, names["proj"], family)
    names = sequence(rec, node, "output")
    drop = names.pop("drop", None)
    if drop is not None:
        if type(rec.modules[drop]) is not nn.Dropout:
            raise Unsupported(f"{rec.path(drop)} is a {type(rec.modules[drop]).__name__}, not a Dropout")
        rec.evaluating(drop)
    only(names, "output", ("upsample", "proj") if pooled else ("proj",))
    if pooled:
        doubling(rec, names["upsample"])
    output = conv(rec, names["proj"], family)
    return Attention(
        query=query, output=output, query_norm=query_norm, heads=heads, query_stride=2 if pooled else 1,
        padding=padding, **found,
    )  # fmt: skip


def mobile_mqa(
    rec: Recorder, node: int, a: Attention, norm: Stage | None, gamma: Tensor | None, residual: bool
) -> Part:
    where = rec.path(node) or "block"
    for name, stage in (("query", a.query), ("key", a.key), ("value", a.value), ("output", a.output)):
        if (stage.kernel, stage.stride, stage.groups) != (1, 1, 1):
            raise Unsupported(f"{where}: only a 1x1 projection of the {name} has a kernel")
        _plain_act(rec, node, stage, name)
    for name, down in (("key", a.key_down), ("value", a.value_down)):
        if down is not None and not down.depthwise:
            raise Unsupported(f"{where}: only a depthwise down-sampling of the {name} has a kernel")
        _plain_act(rec, node, down, name)
    downs = [(d.kernel, d.stride) for d in (a.key_down, a.value_down) if d is not None]
    if len(downs) == 1 or len(set(downs)) > 1:
        raise Unsupported(f"{where}: key and value that are down-sampled in two ways have no kernel")
    kernel, kv_stride = downs[0] if downs else (3, 1)
    if downs and kv_stride == 1:
        raise Unsupported(f"{where}: a depthwise of stride 1 before key and value has no kernel")
    c, key_dim, value_dim = a.query.c_in, a.key.c_out, a.value.c_out
    if a.query.c_out != a.heads * key_dim or a.output.c_in != a.heads * value_dim or a.output.c_out != c:
        raise Unsupported(
            f"{where}: {c} -> {a.heads} heads of {key_dim}, {a.output.c_in} -> {a.output.c_out} channels have no kernel"
        )
    found = {s.padding for s in (a.key_down, a.value_down) if s is not None and s.padding is not None}
    found |= {a.padding} if a.padding is not None else set()
    if len(found) > 1:
        raise Unsupported(f"{where}: symmetric and SAME padding in one block have no kernel")
    padding = found.pop() if found else "symmetric"
    spec = _spec(
        rec, node, MQASpec, c, a.heads, key_dim, value_dim, kv_stride, a.query_stride, kernel,
        residual, gamma is not None, padding, norm is not None,
    )  # fmt: skip
    params, eps = _params(norm, a.query_norm, a.query, a.key_down, a.key, a.value_down, a.value, a.output)
    args = a.heads, kv_stride, a.query_stride, padding, residual
    return _part(rec, node, "block", spec, "mobile_mqa", [*params, gamma], eps, *args)


def _classifier(rec: Recorder, linears: tuple[type, ...]) -> Stage | None:
    node = rec.child(0, "classifier")
    kind = type(rec.modules[node])
    if kind is nn.Identity:
        return None
    if kind not in linears:
        raise Unsupported(f"classifier is a {kind.__module__}.{kind.__name__}, not a Linear")
    weight, bias = rec.tensor(node, "weight"), rec.tensor(node, "bias", optional=True)
    assert weight is not None
    return Stage([weight, bias, None, None, None, None], 0.0, weight.shape[1], weight.shape[0], 1, 1, 1, None)


def head(rec: Recorder, hidden_of: Hidden, linears: tuple[type, ...], pre_logits: bool) -> Part:
    """Pool, 1x1 + act, flatten, classifier (not with `pre_logits`); `linears` are the exact classes of the last."""
    # dropout before the classifier acts in training only
    rec.evaluating(0)
    hidden = hidden_of(rec)
    flatten = rec.child(0, "flatten")
    if type(rec.modules[flatten]) is not nn.Flatten or rec.attribute(flatten, "start_dim") != 1:
        raise Unsupported("a head that does not flatten has no kernel")
    if (hidden.kernel, hidden.stride, hidden.groups) != (1, 1, 1):
        raise Unsupported("conv_head: only a 1x1 convolution has a kernel here")
    linear = None if pre_logits else _classifier(rec, linears)
    c_in = hidden.c_in
    spec = _spec(rec, 0, HeadSpec, c_in, 0, hidden.c_out, linear.c_out if linear else 0, hidden.act)
    params, eps = _params(None, hidden, linear)
    return _part(rec, 0, "pre_logits" if pre_logits else "head", spec, "head", params, eps, hidden.act)


def with_head(rec: Recorder, recipe: Recipe, head: Callable[[Recorder], Part]) -> Recipe:
    """Adds the head to the trunk in `recipe`, as one op with the last 1x1 where that goes."""
    mark = rec.mark()
    try:
        tail = head(rec)
    except Unsupported as error:
        rec.rewind(mark)
        recipe.steps.append(Call(0, "forward_head", str(error)))
        return recipe
    last = recipe.steps[-1]
    merged = _merge_feat(last, tail) if isinstance(last, Part) else None
    recipe.steps[len(recipe.steps) - (merged is not None) :] = [merged or tail]
    return recipe


def not_overridden(rec: Recorder, cls: type, *names: str) -> None:
    """Refuses a model whose instance or class has its own methods of these names."""
    for name in names:
        rec.absent(0, name)
        if getattr(type(rec.modules[0]), name) is not getattr(cls, name):
            raise Unsupported(f"{type(rec.modules[0]).__name__} has its own {name}")


def _merge_feat(feat: Part, tail: Part) -> Part | None:
    """The last 1x1 of the trunk and the head as one op, where their activations are the same."""
    f, t = feat.spec, tail.spec
    if not (isinstance(f, ConvSpec) and isinstance(t, HeadSpec)):
        return None
    if (f.kernel, f.stride) != (1, 1) or f.act != t.act or feat.slot != "block":
        return None
    spec = HeadSpec(f.c_in, f.c_out, t.c_hidden, t.classes, t.act)
    params, eps = [*feat.params, *tail.params[6:]], [*feat.eps, *tail.eps[1:]]
    return Part(tail.node, f"{tail.slot}+feat", tail.name, spec, "head", params, eps, tail.args)
