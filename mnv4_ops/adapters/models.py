"""The trunk of a model as a recipe: stem, then the blocks of `model.blocks` in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from mnv4_ops.spec import MQASpec, UIBSpec

from .record import Call, Part, Recipe, Recorder, Unsupported

Adapter = Callable[[Recorder, int], Part]


def trunk(
    rec: Recorder,
    recipe: Recipe,
    stem: Callable[[Recorder], Part],
    stem_modules: tuple[str, ...],
    adapters: Mapping[type, Adapter],
    emit: Mapping[int, int] | None = None,
) -> None:
    """Fills the recipe. What a part cannot serve becomes a call of the module, otherwise forgotten.

    `emit`: keys are the stages (0 is the stem) whose output is a feature.
    """
    mark = rec.mark()
    try:
        recipe.steps.append(stem(rec))
    except Unsupported as error:
        rec.rewind(mark)
        recipe.steps += [Call(rec.child(0, name, called=True), name, str(error)) for name in stem_modules]
    if emit is not None and 0 in emit:
        recipe.emit.append(len(recipe.steps) - 1)
    blocks = rec.child(0, "blocks")
    if type(rec.modules[blocks]) is not nn.Sequential:
        raise Unsupported(f"blocks is a {type(rec.modules[blocks]).__name__}, not a Sequential")
    for index, (_, stage) in enumerate(rec.children(blocks), 1):
        if type(rec.modules[stage]) is not nn.Sequential:
            raise Unsupported(f"{rec.path(stage)} is a {type(rec.modules[stage]).__name__}, not a Sequential")
        for name in list(rec.modules[stage]._modules):
            recipe.steps.append(_step(rec, stage, name, adapters))
        if emit is not None and index in emit:
            recipe.emit.append(len(recipe.steps) - 1)
    if not any(isinstance(step, Part) and isinstance(step.spec, UIBSpec) for step in recipe.steps):
        raise Unsupported("no block of the model is a Universal Inverted Bottleneck that a kernel serves")


def _step(rec: Recorder, stage: int, name: str, adapters: Mapping[type, Adapter]) -> Part | Call:
    mark = rec.mark()
    node = rec.child(stage, name)
    adapter = adapters.get(type(rec.modules[node]))
    try:
        if adapter is None:
            raise Unsupported(f"{type(rec.modules[node]).__name__} has no kernel")
        part = adapter(rec, node)
        if isinstance(part.spec, MQASpec) and part.spec.query_stride > 1:
            raise Unsupported("not every size of image has a kernel: decided on each call")
        return part
    except Unsupported as error:
        rec.rewind(mark)
        return Call(rec.child(stage, name, called=True), rec.path(node), str(error))
