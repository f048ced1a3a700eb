"""`MobileMQA`: the GPU mirror of `_core.MobileMQA`.

Three ways to run a block (paths of its configurations): keys and values made by the attending kernel itself (small
maps, one launch); a kernel for keys and values, then one for the rest, or, where that has too few tiles, for a share
of the heads and a 1x1; projections, attention and 1x1 as kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import hopper, mqa_config, mqa_hopper_build
from .attention_op import LOG2_E, build_attention, full_pieces
from .block import LINEAR_TF32, Plan, _check, _link, _positive, _Runner
from .build import Build, build_op, options, pad_before
from .config import Config
from .launch import Launch, OutOfResources, interpreted
from .mqa import mqa_kernel, mqa_output_kernel, mqa_project_kernel
from .plan import K_PAD, Op, Packed, batch_norm_affine, round_up

# the stages of `pack`
NORM, QUERY_NORM, QUERY, KEY_DOWN, KEY, VALUE_DOWN, VALUE, OUTPUT = range(8)


def _moments(c: int, device: Any, mean: Tensor | None, var: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance that a BatchNorm has seen, [c] float64."""
    if mean is None or var is None:
        return torch.zeros(c, dtype=torch.float64, device=device), torch.ones(c, dtype=torch.float64, device=device)
    return mean.detach().double(), var.detach().double()


class _Plan(Plan):
    """Ends with small tiles, not with an error, where the chosen path does not fit on the device.

    A `mqa_kernel` is not made smaller: that takes stages, see `mqa_config`.
    """

    def __init__(self, launches: list[Launch], scratch: int, choice: Config, last: Config) -> None:
        super().__init__(launches, scratch, choice)
        self._last = last

    def smaller(self, failed: int) -> Config:
        if any(cfg["path"] == "mqa" or cfg["path"].endswith("hopper") for cfg in self.choice["ops"]):
            return self._last
        try:
            return super().smaller(failed)
        except OutOfResources:
            if [cfg["path"] for cfg in self.choice["ops"]] == [cfg["path"] for cfg in self._last["ops"]]:
                raise
            return self._last


class MobileMQA(_Runner):
    """BN -> multi-query attention -> 1x1 [-> layer scale] [+ x], channels_last; keywords as `_core.MobileMQA`.

    `run` takes [N, c, H, W] of any strides on the device and writes [N, c, H, W] (with query_stride 2: rows and columns
    of the queries, twice), canonical channels_last. `choice` overrides the tables, see `mqa_config`.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: Any,
        c: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        kv_kernel: int = 3,
        kv_stride: int = 1,
        query_stride: int = 1,
        norm: bool = True,
        query_norm: bool = False,
        padding: str = "symmetric",
        residual: bool = False,
    ) -> None:
        super().__init__(dtype, device)
        for name, value in (("c", c), ("heads", heads), ("key_dim", key_dim), ("value_dim", value_dim)):
            _positive("MobileMQA", name, value)
        if max(key_dim, value_dim) > 256:
            raise ValueError(f"MobileMQA: expected heads of at most 256 channels, got {key_dim} and {value_dim}")
        _check("MobileMQA", "kv_kernel", kv_kernel, (3, 5))
        _check("MobileMQA", "kv_stride", kv_stride, (1, 2))
        _check("MobileMQA", "query_stride", query_stride, (1, 2))
        _check("MobileMQA", "padding", padding, ("symmetric", "same"))
        self.native = {
            "c": c, "heads": heads, "key_dim": key_dim, "value_dim": value_dim, "kv_kernel": kv_kernel,
            "kv_stride": kv_stride, "query_stride": query_stride, "norm": norm, "query_norm": query_norm,
            "padding": padding, "residual": residual,
        }  # fmt: skip
        self.c = self.c_in = c
        self.heads = heads
        self.dk, self.dv = mqa_config.width(key_dim), mqa_config.width(value_dim)
        self.down = kv_kernel if kv_stride > 1 else 0
        self.key = (
            f"mqa {c} h{heads} d{key_dim}-{value_dim} k{self.down}s{kv_stride} q{query_stride} {padding}"
            + " +x" * residual
        )
        self.choice: Config | None = None
        # queries of all heads, key, value; every head padded to a power of two
        self.w = Packed(heads * self.dk + self.dk + self.dv, c, 1, False, dtype, self.device)
        self.w_out = Packed(c, heads * self.dv, 1, False, dtype, self.device)
        cp = round_up(c, K_PAD)
        # scale, shift of the pixels of keys and values; of queries
        self.norms = torch.zeros(4, cp, dtype=torch.float32, device=self.device)
        self.taps = torch.zeros(2, self.down**2 + 1, cp if self.down else 1, dtype=torch.float32, device=self.device)
        one, zero = (f(c, dtype=torch.float64, device=self.device) for f in (torch.ones, torch.zeros))
        self._norm = self._query_norm = (one, zero)
        # mean and variance of the pixels, see `mqa_hopper_build.unrest`
        self.moments = (zero, one)
        # what only the kernels in Gluon want
        self.folded: tuple[Tensor, ...] | None = None
        self.steady = True
        self._fill_norms()
        # whether a projection has a bias or a BatchNorm: timm's have neither
        self._affine: dict[int, bool] = {}
        self._wanted = {QUERY, KEY, VALUE, OUTPUT}
        self._wanted |= {KEY_DOWN, VALUE_DOWN} if self.down else set()
        self._wanted |= {NORM} if norm else set()
        self._wanted |= {QUERY_NORM} if query_norm else set()
        self._open = set(self._wanted)
        self.op = Op(
            "pointwise", heads * self.dv, 0, c, 0, 1, "none", "none", "none", (OUTPUT,), residual
        )  # fmt: skip

    def pack(
        self,
        stage: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        bn_weight: Tensor | None = None,
        bn_bias: Tensor | None = None,
        bn_mean: Tensor | None = None,
        bn_var: Tensor | None = None,
        eps: float = 0.0,
        gamma: Tensor | None = None,
    ) -> None:
        """Packs one stage on the device, into the memory that it already has.

        Stages: 0 norm, 1 query_norm (a BatchNorm alone), 2 query [h * dk, c], 3 key_down [c, 1, k, k], 4 key [dk, c],
        5 value_down, 6 value [dv, c], 7 output [c, h * dv] with the layer scale `gamma` [c]; any strides.
        """
        if stage not in self._wanted:
            raise ValueError(f"MobileMQA.pack: expected stage in {sorted(self._wanted)}, got {stage}")
        with torch.no_grad():
            self._pack(stage, weight, (bias, bn_weight, bn_bias, bn_mean, bn_var, eps), gamma)
        self._open.discard(stage)
        self._missing = bool(self._open)
        if not self._missing and self.dtype != torch.float32 and hopper.available():
            # here, since a call may be captured
            steady = self.steady
            mqa_hopper_build.fold(self)
            if self.steady != steady:
                self._plans.clear()
            # a kernel between the parameters' and the block's, which may read them before the one before it has ended
            torch.zeros(1, device=self.device)

    def _pack(self, stage: int, weight: Tensor | None, norm: tuple[Any, ...], gamma: Tensor | None) -> None:
        if stage in (NORM, QUERY_NORM):
            folded = batch_norm_affine(self.c, self.device, *norm)
            if stage == NORM:
                self._norm, self.moments = folded, _moments(self.c, self.device, *norm[3:5])
            else:
                self._query_norm = folded
            self._fill_norms()
            return
        n = self.native
        # heads, channels of each and their place in `w`
        place = {
            QUERY: (self.heads, n["key_dim"], self.dk, 0),
            KEY: (1, n["key_dim"], self.dk, self.heads * self.dk),
            VALUE: (1, n["value_dim"], self.dv, (self.heads + 1) * self.dk),
        }
        want = {
            KEY_DOWN: self.c * self.down**2, VALUE_DOWN: self.c * self.down**2,
            OUTPUT: self.c * self.heads * n["value_dim"],
        }  # fmt: skip
        expected = want[stage] if stage in want else place[stage][0] * place[stage][1] * self.c
        if weight is None or weight.numel() != expected:
            got = None if weight is None else f"shape {tuple(weight.shape)}"
            raise ValueError(
                f"MobileMQA.pack: expected the weight of stage {stage} with {expected} elements, got {got}"
            )
        if stage in (KEY_DOWN, VALUE_DOWN):
            scale, shift = batch_norm_affine(self.c, self.device, *norm)
            taps, k = self.taps[int(stage == VALUE_DOWN)], self.down
            taps[: k * k, : self.c].copy_((weight.detach().double().reshape(self.c, k * k) * scale[:, None]).t())
            taps[k * k, : self.c].copy_(shift)
        elif stage == OUTPUT:
            wide = weight.new_zeros(self.c, self.heads, self.dv)
            wide[:, :, : n["value_dim"]] = weight.detach().reshape(self.c, self.heads, n["value_dim"])
            self.w_out.fill(wide, *norm, gamma)
        else:
            heads, dim, padded, first = place[stage]
            columns = slice(first, first + heads * padded)
            w = self.w.w[: self.c, columns].unflatten(1, (heads, padded))
            w[:, :, :dim].copy_(weight.detach().reshape(heads, dim, self.c).permute(2, 0, 1))
            self.w.settle()
            scale, shift = batch_norm_affine(heads * dim, self.device, *norm)
            for row, values in zip(self.w.affine, (scale, shift), strict=True):
                row[columns].unflatten(0, (heads, padded))[:, :dim].copy_(values.reshape(heads, dim))
            affine = norm[0] is not None or norm[3] is not None
            if self._affine.get(stage, affine) != affine:
                self._plans.clear()
            self._affine[stage] = affine

    def _fill_norms(self) -> None:
        """The pool of the queries leaves padding out, so that both norms of theirs are one."""
        (scale, shift), (scale_q, shift_q) = self._norm, self._query_norm
        for row, values in zip(self.norms, (scale, shift, scale * scale_q, shift * scale_q + shift_q), strict=True):
            row[: self.c].copy_(values)

    @property
    def stages(self) -> frozenset[int]:
        """What has to be packed."""
        return frozenset(self._wanted)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed parameters."""
        more = sum(t.numel() for t in (self.norms, self.taps, *(self.folded or ())))
        return self.w.bytes + self.w_out.bytes + 4 * more

    @property
    def biased(self) -> bool:
        """Whether a projection of pixels has a bias or a BatchNorm, which published models have not."""
        return any(self._affine.values())

    def query_hw(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of queries."""
        s = self.native["query_stride"]
        return (-(-h // s), -(-w // s)) if self.native["padding"] == "same" else (h // s, w // s)

    def kv_hw(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of keys and values."""
        s = self.native["kv_stride"]
        return -(-h // s), -(-w // s)

    def output_shape(self, n: int, h: int, w: int) -> tuple[int, int, int, int]:
        """[N, c, Ho, Wo] for an input of n x h x w."""
        hq, wq = self.query_hw(h, w)
        return n, self.c, hq * self.native["query_stride"], wq * self.native["query_stride"]

    def run(self, x: Tensor, out: Tensor, *, allow_tf32: int = False) -> None:
        """Writes the block of `x` to `out` on the current stream. Scratch comes from torch's caching allocator."""
        self._run(x, out, allow_tf32)

    def choose(self, n: int, h: int, w: int, allow_tf32: int = False) -> Config:
        """The configuration for one geometry: `choice`, else the device's table, else the formula."""
        if self.choice is not None:
            return self.choice
        found = self._measured(n, h, w, self.exact(allow_tf32))
        if found is not None:
            (hq, wq), (hk, wk) = self.query_hw(h, w), self.kv_hw(h, w)
            # a choice in Gluon has one for where that is not to be had beside it
            ways = (found, found.get("otherwise"))
            fitted = (mqa_config.fitted(self, way, hq * wq, hk * wk) for way in ways if way is not None)
            found = next(filter(None, fitted), None)
        return found or mqa_config.formula(self, n, h, w, allow_tf32, self._sms())

    def exact(self, allow_tf32: int) -> bool:
        """Whether the projections are fp32 outside of the tensor cores."""
        return self.dtype == torch.float32 and self._precision(allow_tf32) == "ieee"

    def plan(self, n: int, h: int, w: int, choice: Config, allow_tf32: int = False, strides: Any = None) -> Plan:
        """The launches for a given configuration."""
        item = self.dtype.itemsize
        (hq, wq), (hk, wk) = self.query_hw(h, w), self.kv_hw(h, w)
        configs = choice["ops"]
        paths = [cfg["path"] for cfg in configs]
        # a region that nothing uses takes no memory
        deeper = paths[0] == "mqa_depthwise_hopper"
        kv_size = hk * wk * (self.dk + self.dv)
        regions = [
            (kv_size, deeper or "mqa_project" in paths),
            (hq * wq * self.heads * self.dk, "attention" in paths),
            (hq * wq * self.heads * self.dv, len(paths) == 3 and not deeper),
            (hk * wk * 2 * self.c, deeper),
            (hk * wk * (self.heads + 2) * self.dk, "mqa_project_hopper" in paths),
        ]
        places, tail = [], 0
        for size, is_used in regions:
            places.append(("scratch", tail, self.dtype))
            tail += round_up(n * size * item, 256) * is_used
        kv, q, o, deep, qkv = places
        x, out = ("x", 0, self.dtype), ("out", 0, self.dtype)
        precision, attention = self._precision(allow_tf32), "ieee"
        if self.dtype == torch.float32 and allow_tf32 & LINEAR_TF32:
            attention = "tf32"
        built: list[Build] = []
        for cfg in configs:
            if cfg["path"] == "mqa_project":
                built.append(self._project(cfg, precision, n, h, w, x, kv, q))
            elif cfg["path"] == "mqa":
                target = out if len(paths) < 3 else o
                built.append(self._attend(cfg, precision, attention, n, hq * wq, hk * wk, x, kv, target))
            elif cfg["path"] == "mqa_keys_hopper":
                built.append(mqa_hopper_build.keys(self, cfg, n * hk * wk, deep, kv))
            elif cfg["path"] == "mqa_depthwise_hopper":
                built.append(mqa_hopper_build.depthwise(self, cfg, n, h, w, x, deep))
            elif cfg["path"] == "mqa_hopper":
                built.append(mqa_hopper_build.attend(self, cfg, n, hq * wq, hk * wk, x, kv, out))
            elif cfg["path"] == "mqa_project_hopper":
                built.append(mqa_hopper_build.project(self, cfg, n * hk * wk, x, qkv))
            elif cfg["path"] == "attention_hopper":
                built.append(mqa_hopper_build.attention(self, cfg, n, hk * wk, qkv, o))
            elif cfg["path"] == "pointwise_hopper":
                built.append(mqa_hopper_build.output(self, cfg, n * hq * wq, o, x, out))
            elif cfg["path"] == "attention":
                k = self.dk
                built.append(
                    build_attention(
                        cfg, attention, n, self.heads * hq * wq, self.heads, hk * wk, (k, k, self.dv, self.dv),
                        self.native["key_dim"] ** -0.5,
                        (q, (hq * wq * self.heads * k, self.heads * k, k, 1)),
                        (kv, (kv_size, k + self.dv, 1)),
                        ((kv[0], kv[1] + k * item, kv[2]), (kv_size, k + self.dv, 1)),
                        (o, (hq * wq * self.heads * self.dv, self.heads * self.dv, self.dv, 1)),
                        self.norms,
                    )
                )  # fmt: skip
            elif cfg["path"] == "mqa_output":
                built.append(self._output(cfg, precision, n, hq, wq, o, x, out))
            else:
                packed = {OUTPUT: self.w_out}
                built.append(build_op(self.op, dict(cfg), packed, "symmetric", precision, n, hq, wq, o, x, out, None))
        launches: list[Launch] = []
        scratch = _link(built, tail, launches, n)
        return _Plan(launches, scratch, choice, mqa_config.small(self, n, h, w))

    def _project(self, cfg: Config, precision: str, n: int, h: int, w: int, x: Any, kv: Any, q: Any) -> Build:
        (hq, wq), (hk, wk) = self.query_hw(h, w), self.kv_hw(h, w)
        native = self.native
        queries = bool(cfg["q"])
        kv_tiles = -(-n * hk * wk // cfg["p"])
        q_tiles = -(-n * hq * wq // cfg["pq"]) * -(-self.heads * self.dk // cfg["n"]) if queries else 0
        stride = native["kv_stride"]
        pads = [pad_before(size, self.down, stride, native["padding"]) if self.down else 0 for size in (h, w)]
        scalars = {
            "PK": n * hk * wk, "PQ": n * hq * wq, "H": h, "W": w, "HK": hk, "WK": wk, "HQ": hq, "WQ": wq,
            "PAD_Y": pads[0], "PAD_X": pads[1], "KV_TILES": kv_tiles,
        }  # fmt: skip
        constants = {
            "C": self.c, "CP": self.norms.shape[1], "NP": self.w.np, "HEADS": self.heads, **self._dims(),
            "KERNEL": self.down, "STRIDE": stride, "QUERY_STRIDE": native["query_stride"],
            "QUERIES": queries, "BLOCK_P": cfg["p"], "BLOCK_K": cfg["k"], "BLOCK_Q": cfg["pq"], "BLOCK_N": cfg["n"],
            "AFFINE": self.biased, "PRECISION": precision, "ZERO": 0, "STAGES": cfg["stages"],
        }  # fmt: skip
        w = self.w.matrix(precision)
        return Build(
            mqa_project_kernel, (kv_tiles + q_tiles, 1, 1),
            lambda p, c, z, s: [x, self.norms, self.taps, w, self.w.affine, kv, q if queries else kv, z],
            scalars, constants, options(cfg), self.norms,
        )  # fmt: skip

    def _dims(self) -> dict[str, int]:
        return {"DK": self.native["key_dim"], "DKP": self.dk, "DV": self.native["value_dim"], "DVP": self.dv}

    def _attend(
        self, cfg: Config, precision: str, attention: str, n: int, nq: int, nk: int, x: Any, kv: Any, out: Any
    ) -> Build:
        inline, share = bool(cfg.get("inline")), cfg.get("share", 0)
        keys0, keys1 = mqa_config.key_pieces(cfg, nq, nk, self.down)
        if cfg["stages"] < 2 and cfg["p"] >= 64:
            raise ValueError(f"MobileMQA: expected at least two stages for tiles of 64 pixels, got {cfg}")
        tiles = -(-nq // cfg["p"])
        heads = share or self.heads
        constants = {
            "C": self.c, "CP": self.norms.shape[1], "NP": self.w.np, "N": self.c, "NP_OUT": self.w_out.np,
            "HEADS": self.heads, **self._dims(), "INLINE": inline, "PROJECT": not share,
            "RESIDUAL": self.native["residual"], "BLOCK_P": cfg["p"], "BLOCK_K": cfg["k"],
            "BLOCK_N0": cfg["n0"], "BLOCK_N1": cfg["n1"], "KEYS0": keys0, "KEYS1": keys1,
            "SHARE": heads, "FULL": full_pieces(keys0, keys1, nk), "OPAQUE": not interpreted(),
            "AFFINE": self.biased, "PRECISION": precision, "ATTENTION": attention, "ZERO": 0,
            "STAGES": cfg["stages"],
        }  # fmt: skip
        scalars = {"TILES": tiles, "NQ": nq, "NK": nk, "scale": self.native["key_dim"] ** -0.5 * LOG2_E}
        return Build(
            mqa_kernel, (n * tiles, -(-self.heads // heads), 1),
            lambda p, c, z, s: [
                x, self.norms, x if inline else kv, self.w.matrix(precision), self.w.affine,
                self.w_out.matrix(precision), self.w_out.affine, out, z,
            ],
            scalars, constants, options(cfg), self.norms,
        )  # fmt: skip

    def _output(self, cfg: Config, precision: str, n: int, hq: int, wq: int, o: Any, x: Any, out: Any) -> Build:
        stride = self.native["query_stride"]
        pixels = n * hq * wq * stride**2
        constants = {
            "C": self.heads * self.dv, "N": self.c, "NP": self.w_out.np, "STRIDE": stride,
            "RESIDUAL": self.native["residual"], "BLOCK_P": cfg["p"], "BLOCK_K": cfg["k"], "BLOCK_N": cfg["n"],
            "PRECISION": precision,
        }  # fmt: skip
        return Build(
            mqa_output_kernel, (-(-pixels // cfg["p"]), -(-self.c // cfg["n"]), 1),
            lambda p, c, z, s: [o, self.w_out.matrix(precision), self.w_out.affine, x, out],
            {"J": pixels, "HQ": hq, "WQ": wq}, constants, options(cfg), self.norms,
        )  # fmt: skip
