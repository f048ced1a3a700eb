"""`Block` and `Head`: the GPU mirrors of `_core.Block` and `_core.Head`."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from . import config
from .build import Build, build_op, build_pool
from .config import Config
from .launch import Launch, OutOfResources, current_device, current_stream, interpreted
from .plan import Op, Packed, apart, chain, fused, place, round_up, spread

ACTS = ("none", "relu", "relu6", "gelu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLANS = 64
# bytes of scratch above which a block takes its batch in chunks
SCRATCH = 320 << 20
# bits of `allow_tf32`: in convolutions, in the classifier
CONV_TF32, LINEAR_TF32 = 1, 2


def _check(owner: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: expected {name} to be one of {', '.join(map(str, allowed))}, got {value!r}")


def _positive(owner: str, name: str, value: int, low: int = 1) -> None:
    if not isinstance(value, int) or value < low:
        raise ValueError(f"{owner}: expected {name} to be an int of at least {low}, got {value!r}")


class Plan:
    """The launches of one call for one input geometry, and the bytes of scratch that they share."""

    def __init__(self, launches: list[Launch], scratch: int, choice: Config) -> None:
        self.launches, self.scratch, self.choice = launches, scratch, choice
        self.ready = False

    def smaller(self, failed: int) -> Config:
        """The choice with the next smaller tile for the launch that did not fit; OutOfResources where there is none."""
        ops = list(self.choice["ops"])
        at = failed % len(ops)
        tile = config.shrink(ops[at])
        if tile is None:
            raise OutOfResources(0, 0, f"the smallest tile of {ops[at]}")
        ops[at] = tile
        return {**self.choice, "ops": ops}


class _Runner:
    """Packed parameters by stage and a bounded cache of plans by geometry."""

    def __init__(self, dtype: torch.dtype, device: Any) -> None:
        name = type(self).__name__
        _check(name, "dtype", dtype, DTYPES)
        self.dtype, self.device = dtype, torch.device(device)
        self.packed: dict[int, Packed] = {}
        self._plans: OrderedDict[tuple, Plan] = OrderedDict()
        self._missing = True
        self._strided = False

    def pack(
        self,
        stage: int,
        weight: Tensor,
        bias: Tensor | None = None,
        bn_weight: Tensor | None = None,
        bn_bias: Tensor | None = None,
        bn_mean: Tensor | None = None,
        bn_var: Tensor | None = None,
        eps: float = 0.0,
        gamma: Tensor | None = None,
    ) -> None:
        """Folds one stage in float64 on the device, into the memory that it already has.

        weight [O, I / groups, k, k] or [O, I], the rest [O]; any strides.
        """
        if stage not in self.packed:
            raise ValueError(f"{type(self).__name__}.pack: expected stage in {sorted(self.packed)}, got {stage}")
        packed = self.packed[stage]
        want = packed.c_out * (1 if packed.depthwise else packed.c_in) * packed.kernel**2
        if weight.numel() != want:
            raise ValueError(
                f"{type(self).__name__}.pack: expected the weight of stage {stage} with {want} elements, "
                f"got shape {tuple(weight.shape)}"
            )
        packed.fill(weight, bias, bn_weight, bn_bias, bn_mean, bn_var, eps, gamma)
        self._missing = not all(p.filled for p in self.packed.values())

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed parameters."""
        return sum(p.bytes for p in self.packed.values())

    def _run(self, x: Tensor, out: Tensor, allow_tf32: int) -> None:
        if self._missing:
            missing = sorted(s for s, p in self.packed.items() if not p.filled)
            raise RuntimeError(f"{type(self).__name__}.run: expected all stages packed, missing {missing}")
        n, _, h, w = x.shape
        if n == 0:
            return
        strides = self.reads(x)
        if strides is False:
            strides = None
            x = x.contiguous(memory_format=torch.channels_last)
            if x.data_ptr() % 16:
                x = x.clone(memory_format=torch.channels_last)
        if out.data_ptr() % 16:
            aligned = torch.empty_like(out)
            self._run(x, aligned, allow_tf32)
            out.copy_(aligned)
            return
        key = (n, h, w, allow_tf32, strides)
        plan = self._plans.get(key)
        if plan is not None and plan.ready:
            self._start(plan, x, out)
            return
        if plan is None:
            plan = self.prepare(n, h, w, allow_tf32, strides)
        self._keep(key, self.settle(plan, x, out, allow_tf32, strides))

    def settle(self, plan: Plan, x: Tensor, out: Tensor, allow_tf32: int, strides: Any = None) -> Plan:
        """Runs a plan, or one of smaller tiles where the device has no room for its own; the plan that ran."""
        n, _, h, w = x.shape
        while (failed := self._start(plan, x, out)) is not None:
            plan = self.plan(n, h, w, plan.smaller(failed), allow_tf32, strides)
        return plan

    def _keep(self, key: tuple, plan: Plan) -> None:
        self._plans[key] = plan
        if len(self._plans) > PLANS:
            self._plans.popitem(last=False)

    def reads(self, x: Tensor) -> tuple[int, ...] | bool | None:
        """None: as it lies, channels_last; strides: as it lies, by these; False: only a copy of it."""
        if x.data_ptr() % 16:
            return False
        if x.is_contiguous(memory_format=torch.channels_last):
            return None
        return x.stride() if self._strided else False

    def ready(self, n: int, h: int, w: int, allow_tf32: int, strides: Any) -> Plan | None:
        """The plan for a geometry, once it has run."""
        plan = self._plans.get((n, h, w, allow_tf32, strides))
        return plan if plan is not None and plan.ready else None

    def prepare(self, n: int, h: int, w: int, allow_tf32: int, strides: Any) -> Plan:
        """The plan for a geometry."""
        key = (n, h, w, allow_tf32, strides)
        plan = self._plans.get(key)
        if plan is None:
            plan = self.plan(n, h, w, self.choose(n, h, w, allow_tf32), allow_tf32, strides)
            self._keep(key, plan)
        return plan

    def _start(self, plan: Plan, x: Tensor, out: Tensor) -> int | None:
        """Runs a plan; the index of the launch that the device has no room for, if there is one."""
        scratch = torch.empty(plan.scratch, dtype=torch.uint8, device=x.device) if plan.scratch else out
        if not x.is_cuda or x.device.index == current_device():
            return self._launch(plan, x, out, scratch)
        with torch.cuda.device(x.device):
            return self._launch(plan, x, out, scratch)

    @staticmethod
    def _launch(plan: Plan, x: Tensor, out: Tensor, scratch: Tensor) -> int | None:
        if plan.ready:
            base = {None: 0, "x": x.data_ptr(), "out": out.data_ptr(), "scratch": scratch.data_ptr()}
            stream = current_stream(x.device.index)
            for launch in plan.launches:
                launch.again(base, stream)
            return None
        tensors = {"x": x, "out": out, "scratch": scratch}
        for i, launch in enumerate(plan.launches):
            try:
                launch.first(tensors)
            except OutOfResources:
                return i
        plan.ready = all(launch.ready for launch in plan.launches)
        return None

    def choose(self, n: int, h: int, w: int, allow_tf32: int = False) -> Config:
        raise NotImplementedError

    def plan(self, n: int, h: int, w: int, choice: Config, allow_tf32: int = False, strides: Any = None) -> Plan:
        raise NotImplementedError

    def _precision(self, allow_tf32: int) -> str:
        return "tf32" if allow_tf32 & CONV_TF32 and self.dtype == torch.float32 else "ieee"

    def _measured(self, n: int, h: int, w: int, exact: bool) -> Config | None:
        """The entry of the device's table, the user's own before the shipped one."""
        if self.device.type != "cuda":
            return None
        from mnv4_ops import tuning

        dtype = str(self.dtype).removeprefix("torch.") + ("" if exact or self.dtype != torch.float32 else "_tf32")
        entries = tuning.table(torch.cuda.get_device_name(self.device))
        keys = [f"{dtype} {self.key}"]
        if self.dtype == torch.bfloat16:
            # same bytes, same tensor cores
            keys.append(f"float16 {self.key}")
        keys += [config.alike(key) for key in keys]
        return next(filter(None, (config.lookup(entries, key, n, h, w) for key in keys)), None)

    def _sms(self) -> int:
        return config.device_limits(self.device.index or 0)[0] if self.device.type == "cuda" else 132

    def _formula(self, op: Op, n: int, h: int, w: int, exact: bool) -> Config:
        return config.formula(op, n, h, w, self.dtype.itemsize, exact, self._sms())


class Block(_Runner):
    """One convolution block: [depthwise ->] [1x1 or k x k ->] [depthwise ->] [1x1] [+ x], channels_last.

    Keywords as `_core.Block`; ValueError for what has no kernel. `run` takes [N, c_in, H, W] of any strides on the
    device and writes [N, c_out, Ho, Wo], canonical channels_last. `choice` overrides the tables:
    {"fused": bool, "chunk": images, "ops": [Config, ...]}; a configuration of path "depthwise" in the place of a
    [depthwise ->] 1x1, followed by one of the 1x1, makes two kernels of it.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: Any,
        c_in: int,
        c_mid: int,
        c_out: int,
        start_kernel: int = 0,
        start_stride: int = 1,
        start_act: str = "none",
        expand: bool = False,
        expand_kernel: int = 1,
        expand_stride: int = 1,
        expand_act: str = "none",
        mid_kernel: int = 0,
        mid_stride: int = 1,
        mid_act: str = "none",
        project: bool = False,
        project_act: str = "none",
        residual: bool = False,
        padding: str = "symmetric",
    ) -> None:
        super().__init__(dtype, device)
        for name, value in (("c_in", c_in), ("c_mid", c_mid), ("c_out", c_out)):
            _positive("Block", name, value)
        for name, value in (("start_kernel", start_kernel), ("mid_kernel", mid_kernel)):
            _check("Block", name, value, (0, 3, 5))
        _check("Block", "expand_kernel", expand_kernel, (1, 3, 5, 7))
        for name, value in (
            ("start_stride", start_stride), ("expand_stride", expand_stride), ("mid_stride", mid_stride),
        ):  # fmt: skip
            _check("Block", name, value, (1, 2))
        for name, value in (
            ("start_act", start_act), ("expand_act", expand_act), ("mid_act", mid_act), ("project_act", project_act),
        ):  # fmt: skip
            _check("Block", name, value, ACTS)
        _check("Block", "padding", padding, ("symmetric", "same"))
        if not expand and c_mid != c_in:
            raise ValueError(f"Block: expected c_mid == c_in == {c_in} without expand, got {c_mid}")
        if not project and c_out != c_mid:
            raise ValueError(f"Block: expected c_out == c_mid == {c_mid} without project, got {c_out}")
        if not (start_kernel or expand or mid_kernel or project):
            raise ValueError("Block: expected at least one stage, got none")
        self.native = {
            "c_in": c_in, "c_mid": c_mid, "c_out": c_out,
            "start_kernel": start_kernel, "start_stride": start_stride, "start_act": start_act,
            "expand": expand, "expand_kernel": expand_kernel, "expand_stride": expand_stride,
            "expand_act": expand_act, "mid_kernel": mid_kernel, "mid_stride": mid_stride, "mid_act": mid_act,
            "project": project, "project_act": project_act, "residual": residual, "padding": padding,
        }  # fmt: skip
        self.stride = (
            (start_stride if start_kernel else 1) * (expand_stride if expand else 1) * (mid_stride if mid_kernel else 1)
        )
        if residual and (c_in != c_out or self.stride != 1):
            raise ValueError(
                f"Block: residual expected with stride 1 and c_in == c_out, got stride {self.stride}, {c_in} -> {c_out}"
            )
        self.ops = chain(self.native)
        self.fused_ops = fused(self.ops)
        first = self.ops[0]
        self._strided = first.kind == "dense" and first.c_in <= 8 and not first.residual
        self.key = " | ".join(op.key for op in self.ops) + f" {padding}"
        self.choice: Config | None = None
        if start_kernel:
            self.packed[0] = Packed(c_in, c_in, start_kernel, True, dtype, self.device)
        if expand:
            self.packed[1] = Packed(c_mid, c_in, expand_kernel, False, dtype, self.device)
        if mid_kernel:
            self.packed[2] = Packed(c_mid, c_mid, mid_kernel, True, dtype, self.device)
        if project:
            self.packed[3] = Packed(c_out, c_mid, 1, False, dtype, self.device)

    def output_shape(self, n: int, h: int, w: int) -> tuple[int, int, int, int]:
        """[N, c_out, Ho, Wo] for an input of n x h x w."""
        for op in self.ops:
            h, w = op.out_hw(h, w)
        return n, self.native["c_out"], h, w

    def run(self, x: Tensor, out: Tensor, *, allow_tf32: int = False) -> None:
        """Writes the block of `x` to `out` on the current stream. Scratch comes from torch's caching allocator."""
        self._run(x, out, allow_tf32)

    def _precision(self, allow_tf32: int) -> str:
        # for so few channels cuDNN has fp32 kernels alone, and a convolution of an image in tf32 would stand out
        few = self.ops[0].kind == "dense" and self.ops[0].c_in < 16
        return "ieee" if few else super()._precision(allow_tf32)

    def choose(self, n: int, h: int, w: int, allow_tf32: int = False) -> Config:
        """The configuration for one geometry: `choice`, else the device's table, else the formula."""
        if self.choice is not None:
            return self.choice
        exact = self._precision(allow_tf32) == "ieee" and self.dtype == torch.float32
        return self._measured(n, h, w, exact) or self.by_formula(n, h, w, exact)

    def by_formula(self, n: int, h: int, w: int, exact: bool) -> Config:
        """Fused where the matrices fit on the chip and there are programs enough, else one kernel per matrix."""
        ops, is_fused = self.ops, False
        joined = None if exact else self.fused_ops
        if joined is not None:
            last = joined[-1]
            ho, wo = self.output_shape(n, h, w)[2:]
            if last.kind == "dense":
                is_fused = last.c_mid <= 256 and last.c_out <= 256
            else:
                narrow = last.c_in <= config.MAX_PIECES * config.piece_k(last.c_in) and last.c_out <= 256
                is_fused = narrow and last.c_in <= 256 and n * ho * wo >= self._sms() * 64
            ops = joined if is_fused else ops
        configs = []
        for op in ops:
            ho, wo = op.out_hw(h, w)
            alone = config.wants_apart(op, n * ho * wo, exact, self._sms())
            for part in apart(op) if alone else (op,):
                configs.append(self._formula(part, n, h, w, exact))
                h, w = part.out_hw(h, w)
        return {"fused": is_fused, "chunk": 0, "ops": configs}

    def plan(self, n: int, h: int, w: int, choice: Config, allow_tf32: int = False, strides: Any = None) -> Plan:
        """The launches for a given configuration."""
        ops = self.fused_ops if choice["fused"] else self.ops
        assert ops is not None
        ops = spread(ops, [cfg["path"] for cfg in choice["ops"]])
        shapes = [(h, w)]
        for op in ops:
            shapes.append(op.out_hw(*shapes[-1]))
        item = self.dtype.itemsize
        image_in = strides[0] * item if strides else self.native["c_in"] * h * w * item
        image_out = math.prod(self.output_shape(1, h, w)) * item

        def parts(step: int) -> tuple[list[Launch], int]:
            sizes = [min(step, n) * op.c_out * hh * ww * item for op, (hh, ww) in zip(ops, shapes[1:], strict=True)]
            offsets, tail = place([(size, i, i + 1) for i, size in enumerate(sizes[:-1])])
            launches: list[Launch] = []
            scratch = tail
            for first in range(0, n, step):
                x = source = ("x", first * image_in, self.dtype)
                built: list[Build] = []
                for i, (op, cfg) in enumerate(zip(ops, choice["ops"], strict=True)):
                    last = i == len(ops) - 1
                    target = ("out", first * image_out, self.dtype) if last else ("scratch", offsets[i], self.dtype)
                    built.append(
                        build_op(
                            op, dict(cfg), self.packed, self.native["padding"], self._precision(allow_tf32),
                            min(step, n - first), *shapes[i], source, x if op.residual else source, target,
                            strides if i == 0 else None,
                        )
                    )  # fmt: skip
                    source = target
                scratch = max(scratch, _link(built, tail, launches, n))
            return launches, scratch

        step = choice.get("chunk") or n
        while True:
            # chunks must start at addresses that 16-byte loads can take
            if step < n and (step * image_in % 16 or step * image_out % 16):
                return Plan(*parts(n), choice)
            launches, scratch = parts(step)
            if scratch <= SCRATCH or step == 1:
                return Plan(launches, scratch, choice)
            step = -(-step // 2)


def _link(built: list[Build], tail: int, launches: list[Launch], images: int) -> int:
    """Places partial sums, counters and strips behind `tail`; each kernel zeroes the next one's counters. The end.

    The kernels of one image may start early, see `dependent_programs`.
    """
    end = tail
    for i, b in enumerate(built):
        if b.split > 1 and i == 0:
            b.unsplit()
    offsets = []
    longest = 0
    for b in built:
        counters = end + round_up(b.partial_bytes, 256)
        offsets.append((end, counters))
        end = counters + round_up(4 * b.zero, 256)
        longest = max(longest, round_up(b.strip_bytes, 256))
    # all strips share one place behind everything else
    offsets = [(partial, counters, end) for partial, counters in offsets]
    for i, b in enumerate(built):
        following = built[i + 1] if i + 1 < len(built) else None
        zero = following.zero if following is not None and following.split > 1 else 0
        launches.append(b.launch(offsets[i], offsets[i + 1][1] if zero else None, zero, early=images == 1))
    return end + longest


class Head(_Runner):
    """1x1 + act -> global average pool -> 1x1 + act -> linear; keywords as `_core.Head`, every stage but the pool
    optional (0 leaves it out). `out` is [N, features].
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: Any,
        c_in: int,
        c_feat: int = 0,
        feat_act: str = "none",
        c_hidden: int = 0,
        hidden_act: str = "none",
        classes: int = 0,
    ) -> None:
        super().__init__(dtype, device)
        _positive("Head", "c_in", c_in)
        for name, value in (("c_feat", c_feat), ("c_hidden", c_hidden), ("classes", classes)):
            _positive("Head", name, value, 0)
        for name, act in (("feat_act", feat_act), ("hidden_act", hidden_act)):
            _check("Head", name, act, ACTS)
        self.c_in, self.c_feat, self.feat_act = c_in, c_feat, feat_act
        self.pooled = c_feat or c_in
        self.features = classes or c_hidden or self.pooled
        self.ops: tuple[Op, ...] = ()
        self._missing = False
        widths = [self.pooled, c_hidden or self.pooled]
        if c_feat:
            self.packed[0] = Packed(c_feat, c_in, 1, False, dtype, self.device)
        if c_hidden:
            self.packed[1] = Packed(c_hidden, widths[0], 1, False, dtype, self.device)
            self.ops += (Op("pointwise", widths[0], 0, c_hidden, 0, 1, "none", "none", hidden_act, (1,)),)
        if classes:
            self.packed[2] = Packed(classes, widths[1], 1, False, dtype, self.device)
            self.ops += (Op("pointwise", widths[1], 0, classes, 0, 1, "none", "none", "none", (2,)),)
        self._missing = bool(self.packed)
        self.choice: Config | None = None
        feat = f"{c_in}-{c_feat} {feat_act}" if c_feat else str(c_in)
        self.key = " | ".join([f"pool {feat}", *(op.key for op in self.ops)])

    def output_features(self) -> int:
        """Width of the output."""
        return self.features

    def output_shape(self, n: int, h: int, w: int) -> tuple[int, int]:
        """[N, features]."""
        return n, self.features

    def run(self, x: Tensor, out: Tensor, *, allow_tf32: int = False) -> None:
        """Writes the head of `x` [N, c_in, H, W] to `out` [N, features] on the current stream.

        `allow_tf32`: True for the convolutions; 3 for the classifier too, which torch runs under another setting.
        """
        self._run(x, out, allow_tf32)

    def choose(self, n: int, h: int, w: int, allow_tf32: int = False) -> Config:
        """As `Block.choose`; the first configuration is that of the pool."""
        if self.choice is not None:
            return self.choice
        exact = self._precision(allow_tf32) == "ieee" and self.dtype == torch.float32
        found = self._measured(n, h, w, exact) or self.by_formula(n, h, w, exact)
        if self.dtype == torch.float32 and not exact and 2 in self.packed and not allow_tf32 & LINEAR_TF32:
            # tiles for the tensor cores are none for IEEE products
            found = {**found, "ops": [*found["ops"][:-1], self._formula(self.ops[-1], n, 1, 1, True)]}
        return found

    def by_formula(self, n: int, h: int, w: int, exact: bool) -> Config:
        """One kernel for the pool, one per matrix."""
        small = exact or n * h * w * self.pooled < self._sms() * 64 * 128 * 2
        pool = {
            "path": "pool", "p": 32 if exact else 64 if h * w > 32 else max(16, config.next_pow2(h * w)),
            "k": 32 if exact else 64, "n": 64 if small else 128, "warps": 4, "stages": 1 if exact else 3,
        }  # fmt: skip
        return {"fused": False, "chunk": 0, "ops": [pool, *(self._formula(op, n, 1, 1, exact) for op in self.ops)]}

    def plan(self, n: int, h: int, w: int, choice: Config, allow_tf32: int = False, strides: Any = None) -> Plan:
        """The launches for a given configuration."""
        item = self.dtype.itemsize
        widths = [self.pooled, *(op.c_out for op in self.ops)]
        region = round_up(n * max(widths) * item, 256)
        tail = region * min(len(self.ops), 2)
        targets = [("scratch", region * (i % 2), self.dtype) for i in range(len(self.ops))]
        targets.append(("out", 0, self.dtype))
        precision = self._precision(allow_tf32)
        built = [
            build_pool(
                dict(choice["ops"][0]), self.packed.get(0), self.c_in, self.feat_act, precision, n, h * w,
                ("x", 0, self.dtype), targets[0],
            )
        ]  # fmt: skip
        for i, op in enumerate(self.ops):
            built.append(
                build_op(
                    op, dict(choice["ops"][i + 1]), self.packed, "symmetric",
                    precision if op.stages != (2,) or allow_tf32 & LINEAR_TF32 else "ieee", n, 1, 1,
                    targets[i], targets[i], targets[i + 1], None,
                )
            )  # fmt: skip
        launches: list[Launch] = []
        return Plan(launches, _link(built, tail, launches, n), choice)


__all__ = ["Block", "Head", "OutOfResources", "interpreted"]
