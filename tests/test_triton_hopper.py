"""The kernels in Gluon: compiled for Hopper everywhere, run where there is one."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from hopper_compile import TOOL
from mnv4_ops.triton_kernels import config, hopper, mqa_config, mqa_hopper_build
from test_triton_kernels import gpu, run_lines
from triton_cases import output
from triton_mqa_cases import MQACase, run_mqa

from mnv4_ops import _info
from mnv4_ops.spec import MQASpec


def spec(**more: Any) -> MQASpec:
    return MQASpec(**{"c": 160, "heads": 4, "key_dim": 64, "value_dim": 64, "layer_scale": True, **more})


SMALL = spec(c=256)
LARGE = spec(c=192, heads=8, key_dim=48, value_dim=48, kv_stride=2)
WIDE = spec(c=512, heads=8)
STRAIGHT = ["mqa_project_hopper", "attention_hopper", "pointwise_hopper"]


@pytest.mark.slow
@pytest.mark.skipif(not TOOL.exists(), reason="waits for a triton that ships cuobjdump")
def test_machine_programs_for_hopper() -> None:
    """Products by the tensor cores of Hopper, and no address made of the stack pointer (see `hopper`)."""
    lines = run_lines("hopper_compile.py")
    stem = lines.pop()
    # 1312 where threads that follow one another take taps: see `dense.TAPS_FIRST`
    assert stem["kernel"] == "dense_kernel"
    assert stem["instructions"] < 700
    kernels = {line["kernel"] for line in lines}
    assert kernels == {
        "mqa_hopper_kernel", "mqa_keys_hopper_kernel", "mqa_depthwise_hopper_kernel", "mqa_project_kernel",
        "pointwise_hopper_kernel", "attention_hopper_kernel", "mqa_small_hopper_kernel",
    }  # fmt: skip
    for line in lines:
        assert not line["wrong"], line
        assert line["products"] > 0 or line["kernel"] in ("mqa_depthwise_hopper_kernel", "mqa_project_kernel"), line
        # of one program; 227 KiB is what a program can have
        assert line["shared"] <= 227 * 1024, line
        # products of a chain follow one another without a wait, or the assembler has serialised them
        assert line["waits"] <= line["products"] // 2, line


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "available", lambda: True)


def paths(s: MQASpec, n: int, h: int, w: int, dtype: torch.dtype = torch.float16) -> list[str] | None:
    found = mqa_config.on_hopper(MQACase(s, dtype, "cpu").build(), n, h, w)
    return found and [cfg["path"] for cfg in found["ops"]]


def test_versions_that_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(hopper, "_assembler", lambda: "")
    asked = hopper.unavailable
    for version in ("3.6.0", "3.7.1", "3.8.1+git1"):
        monkeypatch.setattr(hopper.triton, "__version__", version)
        assert asked() is None
    for version in ("3.60.0", "4.0.0"):
        monkeypatch.setattr(hopper.triton, "__version__", version)
        assert asked() == f"tested with triton 3.6, 3.7, 3.8, this is {version} (MNV4_OPS_GLUON=1 allows it)"
    gpus, native = [{"capability": "9.0"}, {"capability": "9.0"}], {"loaded": True, "openmp_runtime": "libgomp"}
    lines = [line for line in _info._problems(native, gpus, None) if "Hopper" in line]
    assert lines == [f"Hopper's own kernels, attention blocks run by slower ones: {asked()}"]
    monkeypatch.setenv("MNV4_OPS_GLUON", "1")
    assert asked() is None
    monkeypatch.setattr(hopper, "_assembler", lambda: None)
    assert asked() == f"no ptxas >= 12.9 in triton {version}"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 0))[i])
    assert asked() == "not all GPUs have compute capability 9.0"
    monkeypatch.setenv("MNV4_OPS_GLUON", "0")
    assert asked() == "MNV4_OPS_GLUON=0"


@pytest.mark.usefixtures("present")
def test_what_it_serves() -> None:
    three = ["mqa_depthwise_hopper", "mqa_keys_hopper", "mqa_hopper"]
    assert paths(spec(kv_stride=2), 64, 16, 16) == three
    assert paths(LARGE, 64, 24, 24, torch.bfloat16) == three
    assert paths(SMALL, 64, 8, 8) == ["mqa_hopper"]
    assert paths(SMALL, 64, 12, 12) == ["mqa_project", "mqa_hopper"]
    assert paths(WIDE, 64, 12, 12) == STRAIGHT
    assert paths(spec(c=320, heads=5, key_dim=40), 64, 9, 14) == STRAIGHT


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize(
    ("s", "side", "dtype"),
    [
        (SMALL, 8, torch.float32),
        (spec(c=512, heads=4), 12, torch.float16),
        (spec(c=516, heads=8), 12, torch.float16),
        (spec(c=520, heads=8), 12, torch.float16),
        (WIDE, 14, torch.float16),
        (spec(c=152), 8, torch.float16),
        (spec(key_dim=32, value_dim=32), 8, torch.float16),
        (spec(kv_stride=2, kv_kernel=5), 16, torch.float16),
        (spec(kv_stride=2, query_stride=2), 16, torch.float16),
        (SMALL, 14, torch.float16),  # 196 keys
    ],
)
def test_what_it_leaves_to_others(s: MQASpec, side: int, dtype: torch.dtype) -> None:
    assert paths(s, 64, side, side, dtype) is None


@pytest.mark.usefixtures("present")
def test_few_pixels_and_biases_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    block = MQACase(SMALL, torch.float16, "cpu").build()
    chosen = [cfg["path"] for cfg in mqa_config.formula(block, 1, 8, 8)["ops"]]
    assert "mqa_hopper" not in chosen
    measured = mqa_config.on_hopper(block, 64, 8, 8)
    assert mqa_config.fitted(block, measured, 49, 49) is not None
    assert mqa_config.fitted(block, measured, 81, 81) is None
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "available", lambda: False)
        assert mqa_config.fitted(block, measured, 49, 49) is None
    block.pack(4, torch.randn(64, 256), torch.ones(64))
    assert mqa_config.on_hopper(block, 64, 8, 8) is None
    assert mqa_config.fitted(block, measured, 49, 49) is None


def pack_norm(block: Any, mean: float) -> None:
    """A pre-norm that takes a mean away from pixels of variance 1."""
    c = block.c
    block.pack(0, None, None, torch.ones(c), torch.zeros(c), torch.full((c,), mean), torch.ones(c))


@pytest.mark.usefixtures("present")
def test_norms_that_cost_precision_in_weights_are_left_to_others() -> None:
    block = MQACase(WIDE, torch.float16, "cpu").build()
    pack_norm(block, 0.5)
    measured = mqa_config.on_hopper(block, 64, 12, 12)
    assert [cfg["path"] for cfg in measured["ops"]] == STRAIGHT
    assert mqa_config.fitted(block, measured, 100, 100) is not None
    block._plans["some geometry"] = None
    pack_norm(block, 5.0)
    assert not block._plans
    assert mqa_config.on_hopper(block, 64, 12, 12) is None
    assert mqa_config.fitted(block, measured, 100, 100) is None
    assert STRAIGHT[0] not in [cfg["path"] for cfg in mqa_config.formula(block, 64, 12, 12)["ops"]]


@pytest.mark.usefixtures("present")
def test_folded_projections() -> None:
    """Pixels times the folded matrix plus the shift: the projections of normalised pixels, to a rounding of weights."""
    block = MQACase(WIDE, torch.float16, "cpu").build()
    matrix, shift = block.folded
    x = torch.randn(50, 512).double()
    norms = block.norms.double()
    for columns, scale, constant in ((slice(512), norms[2], norms[3]), (slice(512, 640), norms[0], norms[1])):
        w = block.w.w[:512, columns].double()
        found = x @ matrix[:512, columns].double() + shift[0, columns].double()
        bound = x.abs() @ (w * scale[:, None]).abs() * 2**-11 + 1e-5
        assert ((found - (x * scale + constant) @ w).abs() <= bound).all()
    assert not matrix[:, 640:].any()
    assert not shift[:, 640:].any()


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
def test_unrest(mean: float) -> None:
    """The ratio of errors that it foretells is the one that is found."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).double()

    x, w = mean + normal(400, 256), normal(256, 64).half().double()
    scale = 1 + 0.3 * torch.rand(256, generator=generator).double()
    shift = -mean * scale
    y = x * scale + shift
    inside = x @ (w * scale[:, None]).half().double() + shift @ w
    errors = [(found - y @ w).square().mean().sqrt() for found in (inside, y.half().double() @ w)]
    moments = (torch.full((256,), mean).double(), torch.ones(256).double())
    assert float(errors[0] / errors[1]) == pytest.approx(mqa_hopper_build.unrest(scale, shift, *moments), rel=0.15)


def test_matrices_of_a_call_go_by_descriptors() -> None:
    """The kernel's argument holds the address of each call, in the short way and in a chain's."""
    from mnv4_ops.triton_kernels.chain import _resolved
    from mnv4_ops.triton_kernels.launch import Launch, Mapped

    mapped = Mapped(("x", 32, torch.float16), (100, 48), (64, 32))
    plain = torch.zeros(4)
    launch = Launch(None, (1, 2, 3), [plain, mapped], {}, {}, {})
    got: list[Any] = []
    launch._fast = (lambda *args: got.append(args), None, None)
    for address in (4096, 8192):
        launch.again({None: 0, "x": address}, 0)
        assert got[-1][-2] == plain.data_ptr()
        seen = got[-1][-1]
        assert (seen.base.data_ptr(), seen.shape, seen.strides) == (address + 32, [100, 48], [48, 1])
        assert (seen.block_shape, seen.layout.swizzle_byte_width) == ([64, 32], 64)
    first, second = _resolved((0, 0, 4096, 0), [(3, 7), (2, 64)], launch.mapped)
    assert (first, second.base.data_ptr()) == (7, 4160)


@pytest.mark.parametrize("device", ["nvidia_h200", "nvidia_h100_80gb_hbm3"])
def test_tables_have_another_choice_where_gluon_is_not(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads((config.TUNED / f"{device}.json").read_text())["entries"]
    block = MQACase(SMALL, torch.float16, "cpu").build()
    monkeypatch.setattr(
        block, "_measured", lambda n, h, w, exact: config.lookup(table, f"float16 {block.key}", n, h, w)
    )
    chosen = []
    for there in (True, False):
        monkeypatch.setattr(hopper, "available", lambda there=there: there)
        chosen.append([cfg["path"] for cfg in block.choose(64, 8, 8)["ops"]])
    assert chosen[0] == ["mqa_hopper"]
    assert "mqa_hopper" not in chosen[1]


@pytest.mark.parametrize("k", [3, 5])
def test_shift_table(k: int) -> None:
    """Each entry is the sum over its taps, in the order that the kernel counts ranges."""
    taps, shift, constant = torch.randn(2, k, k, 7).double(), torch.randn(7).double(), torch.randn(2, 7).double()
    table = mqa_hopper_build.shift_table(taps, shift, constant)
    assert table.shape == (k * (k + 1) // 2, k * (k + 1) // 2, 2, 7)

    def number(a: int, b: int) -> int:
        # `_range` of the kernel
        return a * k - a * (a - 1) // 2 + b - a - 1

    ranges = [(a, b) for a, b in itertools.product(range(k), range(k + 1)) if a < b]
    assert sorted(number(a, b) for a, b in ranges) == list(range(len(ranges)))
    for (a, b), (c, d) in itertools.product(ranges, repeat=2):
        expected = taps[:, a:b, c:d].sum((1, 2)) * shift + constant
        torch.testing.assert_close(table[number(a, b), number(c, d)], expected)


def test_assembler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in Gluon are compiled by the newer of two, all others by the usual one."""
    hopper._assembler.cache_clear()

    def tools(usual: str, other: str) -> None:
        found = {"ptxas": SimpleNamespace(path="usual", version=usual)}
        found["ptxas_blackwell"] = SimpleNamespace(path="other", version=other)
        monkeypatch.setattr(hopper, "knobs", SimpleNamespace(nvidia=SimpleNamespace(**found)))

    for usual, other, expected in (
        ("12.8", "12.9", "other"),
        ("12.9", "12.9", ""),
        ("13.0", "12.8", ""),
        ("12.8", "12.8", None),
    ):
        tools(usual, other)
        assert hopper._assembler() == expected
        hopper._assembler.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(hopper, "_assembler", lambda: str(hopper.knobs.nvidia.ptxas.path))
    kernels = {flag: SimpleNamespace(is_gluon=lambda flag=flag: flag) for flag in (True, False)}
    seen = {
        flag: hopper.compiled_soundly(k, lambda: "ptxas" in vars(hopper.knobs.nvidia)) for flag, k in kernels.items()
    }
    assert seen == {True: True, False: False}
    assert "ptxas" not in vars(hopper.knobs.nvidia)


class TestOnHopper:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def _hopper(self) -> None:
        if not hopper.available():
            pytest.skip("waits for an NVIDIA Hopper GPU and a tested triton")

    @staticmethod
    def block(s: MQASpec, dtype: torch.dtype, n: int, h: int, w: int) -> tuple[MQACase, Any]:
        case = MQACase(s, dtype, "cuda")
        block = case.build()
        block.choice = mqa_config.on_hopper(block, n, h, w)
        assert block.choice is not None
        return case, block

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    @pytest.mark.parametrize(
        ("s", "n", "h", "w"),
        [
            (spec(kv_stride=2), 5, 16, 16),
            (spec(kv_stride=2), 200, 16, 16),
            (spec(kv_stride=2, padding="same"), 3, 13, 18),
            (spec(kv_stride=2, residual=False), 3, 9, 7),
            (spec(kv_stride=2), 3, 1, 1),
            (LARGE, 3, 24, 24),
            (spec(c=192, heads=5, key_dim=33, value_dim=48, kv_stride=2), 3, 23, 21),
            (spec(c=192, heads=1, key_dim=48, value_dim=48, kv_stride=2), 2, 11, 25),
            (spec(c=192, heads=2, key_dim=56, value_dim=48, kv_stride=2), 2, 20, 20),
            (SMALL, 300, 8, 8),
            (SMALL, 3, 7, 7),
            (SMALL, 3, 12, 12),
            (spec(c=256, heads=2, key_dim=40, value_dim=48), 3, 5, 6),
            (spec(c=32, heads=3), 3, 9, 9),
            (spec(c=64, heads=1), 3, 1, 1),
            (spec(c=96, heads=3), 2, 8, 8),
            (WIDE, 3, 12, 12),
            (WIDE, 70, 12, 12),
            (spec(c=512, heads=8, residual=False), 3, 7, 9),
            (spec(c=320, heads=5), 3, 11, 12),
            (spec(c=376, heads=8, key_dim=40, value_dim=56), 5, 10, 11),
            (WIDE, 3, 1, 1),
        ],
        ids=str,
    )
    def test_block(self, s: MQASpec, n: int, h: int, w: int, dtype: torch.dtype) -> None:
        case, block = self.block(s, dtype, n, h, w)
        assert max(run_mqa(case, n, h, w, block)) <= 1

    @pytest.mark.parametrize(("s", "side"), [(spec(kv_stride=2), 16), (LARGE, 24), (SMALL, 8), (WIDE, 12)], ids=str)
    def test_infinite_pixels_stay_in_their_image(self, s: MQASpec, side: int) -> None:
        case, block = self.block(s, torch.float16, 3, side, side)
        x = torch.randn(3, s.c, side, side, device="cuda").half().to(memory_format=torch.channels_last)
        clean, out = (output(block, 3, side, side, torch.float16, "cuda") for _ in range(2))
        block.run(x, clean)
        x[1, 5, 2, 3] = float("inf")
        block.run(x, out)
        assert torch.equal(out[::2], clean[::2])
        assert out[1].isnan().any()
        assert case.reference(x, torch.float16)[1].isnan().any()

    def test_whole_model(self) -> None:
        """Also from the second call on, when all launches of a forward are one list."""
        timm = pytest.importorskip("timm")
        import mnv4_ops
        from mnv4_ops.reference import randomize_

        model = randomize_(timm.create_model("mobilenetv4_hybrid_medium")).eval().cuda().half()
        model = model.to(memory_format=torch.channels_last)
        x = torch.randn(64, 3, 224, 224, device="cuda").half().to(memory_format=torch.channels_last)
        with torch.inference_mode():
            plain, truth = model(x), model.float()(x.float())
            model.half()
            with mnv4_ops.enable():
                outs = [model(x) for _ in range(3)]
        allowed = 2 * (plain - truth).abs().max()
        assert all((out - truth).abs().max() <= allowed for out in outs)

    @pytest.mark.parametrize(("s", "side"), [(spec(kv_stride=2), 16), (WIDE, 12)], ids=str)
    def test_new_parameters_are_seen(self, s: MQASpec, side: int) -> None:
        first, block = self.block(s, torch.float16, 2, side, side)
        assert max(run_mqa(first, 2, side, side, block)) <= 1
        second = MQACase(s, torch.float16, "cuda", seed=1)
        second.pack(block)
        assert max(run_mqa(second, 2, side, side, block)) <= 1
