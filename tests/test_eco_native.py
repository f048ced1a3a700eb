"""`mnv4_ops.export`: graphs and AOTInductor packages that hold our op, in Python and in a C++ program without it."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mnv4_ops
from mnv4_ops import _native
from mnv4_ops.reference import randomize_

timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.skipif(_native.core is None, reason="no native library"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = "mobilenetv4_conv_small_035"
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def model(name: str = SMALL, **options: Any) -> Any:
    return randomize_(timm.create_model(name, **({"num_classes": 5} | options))).eval()


def ops(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def enabled(m: nn.Module, x: Tensor) -> Any:
    with torch.no_grad(), mnv4_ops.enable():
        report = mnv4_ops.explain(m, x)
        assert report.served
        return m(x)


class Normalized(nn.Module):
    """Something of the user's own around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x - 0.5) / 0.25).softmax(-1)


# name, options, whether something is around it, how many of our ops
CASES: dict[str, tuple[str, dict[str, Any], bool, int]] = {
    "conv_small": (SMALL, {}, False, 1),
    "conv_medium": ("mobilenetv4_conv_medium", {}, False, 1),
    "hybrid": ("mobilenetv4_hybrid_medium_075", {}, False, 1),
    "pyramid": (SMALL, {"features_only": True}, False, 5),
    "wrapped": (SMALL, {}, True, 1),
    "another pool": (SMALL, {"global_pool": "max"}, False, 1),
    "no classifier": (SMALL, {"num_classes": 0}, False, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_holds_our_op_and_gives_what_the_enabled_model_gives(case: str) -> None:
    name, options, wrapped, count = CASES[case]
    m = model(name, **options)
    if wrapped:
        m = Normalized(m)
    program = mnv4_ops.export(m, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert sum("native_program" in op for op in ops(program)) == count
    assert not [op for op in ops(program) if "conv" in op and case != "another pool"]
    assert set(program.state_dict) == set(m.state_dict())
    run = program.module()
    for x in (X, X[:1], X.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            got, want = run(x), enabled(m, x)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


def test_our_own_models_and_a_single_block() -> None:
    own = randomize_(mnv4_ops.reference.models.create_model("conv_small", num_classes=4)).eval()
    block = model().blocks[2][1]
    for m, x in ((own, X), (block, torch.randn(2, block.pw_proj.conv.out_channels, 7, 9))):
        program = mnv4_ops.export(m, (x,))
        assert ops(program) == ["mnv4.native_program.default"]
        with torch.no_grad():
            assert torch.equal(program.module()(x), enabled(m, x))


def test_it_does_not_change_what_is_enabled() -> None:
    m = model()
    before = type(m).__dict__["forward"]
    mnv4_ops.export(m, (X,))
    assert type(m).__dict__["forward"] is before
    with mnv4_ops.enable(m):
        assert "mnv4.native_program.default" in ops(mnv4_ops.export(m, (X,)))
        with torch.no_grad():
            assert not mnv4_ops.explain(m, X).fallbacks
            assert "mnv4" not in str(torch.export.export(m, (X,)).graph)


def test_saved_and_loaded(tmp_path: Path) -> None:
    m = model()
    torch.export.save(mnv4_ops.export(m, (X,)), tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert torch.equal(run(X), enabled(m, X))


def bias(m: Any) -> None:
    m.classifier.bias.add_(1)


def statistics(m: Any) -> None:
    m.get_submodule("blocks.2.1.pw_exp.bn").running_var.mul_(4)


def weight(m: Any) -> None:
    m.get_submodule("blocks.2.1.pw_exp.conv").weight.mul_(0.5)


@pytest.mark.parametrize("change", [bias, statistics, weight])
def test_weights_that_change_are_packed_again(change: Callable[[Any], None]) -> None:
    """The module of the program has the parameters of the model; the library looks at their memory alone."""
    m = model()
    run = mnv4_ops.export(m, (X,)).module()
    with torch.no_grad():
        first = run(X)
        change(m)
        got = run(X)
        assert not torch.equal(got, first)
        assert torch.equal(got, enabled(m, X))


def test_repack_of_the_library() -> None:
    """One element that is not among those that are looked at."""
    m = model()
    run = mnv4_ops.export(m, (X,)).module()
    with torch.no_grad():
        first = run(X)
        w = run.get_parameter("conv_head.weight")
        assert w.numel() > 8192
        w.view(-1)[1].add_(100.0)
        assert torch.equal(run(X), first)
        ctypes.CDLL(str(mnv4_ops.native_library())).mnv4_ops_repack()
        got = run(X)
        assert not torch.equal(got, first)
        assert torch.equal(got, enabled(m, X))


def training(m: Any) -> Any:
    return m.train()


def double(m: Any) -> Any:
    return m.double()


def other(m: Any) -> Any:
    return nn.Sequential(nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [(training, "train"), (double, "float64"), (other, "no module of a known class")],
    ids=lambda f: getattr(f, "__name__", None),
)
def test_a_model_without_kernels_is_refused_with_the_reason(make: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"mnv4_ops.export: expected a model with blocks that have a kernel.*{words}"):
        mnv4_ops.export(make(model()), (X,))


def call() -> tuple[Tensor, list[Tensor], list[float], str]:
    """A 1x1 convolution with BatchNorm, 3 to 16 channels."""
    params = [torch.randn(16, 3, 1, 1), torch.rand(16), torch.randn(16), torch.randn(16), torch.rand(16)]
    line = "Block c_in=3 c_mid=16 c_out=16 expand=1 expand_act=1 stage=1,0,-1,1,2,3,4,-1,0"
    return torch.randn(2, 3, 5, 4), params, [1e-3], f"mnv4 1\n{line}"


def test_the_op_itself() -> None:
    mnv4_ops.load_native_library()
    x, params, eps, text = call()
    want = nn.functional.batch_norm(
        nn.functional.conv2d(x, params[0]), params[3], params[4], params[1], params[2], eps=1e-3
    ).relu()
    got = torch.ops.mnv4.native_program(x, params, eps, text)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.ops.mnv4.native_program(x[:0], params, eps, text).shape == (0, 16, 5, 4)
    # weights of other strides
    given = [params[0].transpose(0, 1).contiguous().transpose(0, 1), *params[1:]]
    assert torch.equal(torch.ops.mnv4.native_program(x, given, eps, text), got)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.mnv4.native_program.default, (x, params, eps, text))
    with pytest.raises(RuntimeError, match="inference only"):
        torch.ops.mnv4.native_program(x.requires_grad_(), params, eps, text).sum().backward()


REFUSED: dict[str, tuple[Callable[[Tensor, list[Tensor], list[float], str], tuple[Any, ...]], str]] = {
    "another format": (lambda x, p, e, t: (x, p, e, t.replace("mnv4 1", "mnv4 2")), "export it again"),
    "no operation": (lambda x, p, e, t: (x, p, e, "mnv4 1"), "at least one operation"),
    "another operation": (lambda x, p, e, t: (x, p, e, t.replace("Block", "Blok")), "Block, Head or MobileMQA"),
    "another field": (lambda x, p, e, t: (x, p, e, t.replace("c_mid", "c_mad")), "name of a field"),
    "no number": (lambda x, p, e, t: (x, p, e, t.replace("c_in=3", "c_in=3x")), "a whole number"),
    "an act": (lambda x, p, e, t: (x, p, e, t.replace("act=1", "act=9")), "expand_act from 0 to 3"),
    "a flag": (lambda x, p, e, t: (x, p, e, t.replace("expand=1", "expand=2")), "expand from 0 to 1"),
    "a tensor too few": (lambda x, p, e, t: (x, p[:4], e, t), "indices below the 4 params"),
    "a number too few": (lambda x, p, e, t: (x, p, [], t), "below the 0 numbers of eps"),
    "a smaller weight": (lambda x, p, e, t: (x, [p[0][:8], *p[1:]], e, t), r"48 elements of params\[0\], got 24"),
    "a smaller norm": (lambda x, p, e, t: (x, [*p[:4], p[4][:8]], e, t), r"16 elements of params\[4\], got 8"),
    "another stage": (lambda x, p, e, t: (x, p, e, t.replace("stage=1", "stage=3")), "a stage that the operation has"),
    "no stage": (lambda x, p, e, t: (x, p, e, t[: t.index(" stage")]), "all stages"),
    "half a norm": (lambda x, p, e, t: (x, p, e, t.replace("3,4,-1,0", "3,-1,-1,0")), "bn_mean and bn_var together"),
    "no weight": (lambda x, p, e, t: (x, p, e, t.replace("stage=1,0", "stage=1,-1")), "a weight for each stage"),
    "dtype of a weight": (lambda x, p, e, t: (x, [p[0].double(), *p[1:]], e, t), "params of dtype float32"),
    "dtype of x": (lambda x, p, e, t: (x.double(), p, e, t), "x of dtype float32"),
    "dimensions of x": (lambda x, p, e, t: (x[0], p, e, t), "4 dimensions"),
    "channels of x": (lambda x, p, e, t: (x[:, :2], p, e, t), "x with 3 channels, got 2"),
    "no rows": (lambda x, p, e, t: (x[:, :, :0], p, e, t), "at least one row"),
    "eps": (lambda x, p, e, t: (x, p, [-1.0], t), "eps of at least 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(case: str) -> None:
    mnv4_ops.load_native_library()
    change, words = REFUSED[case]
    with pytest.raises(ValueError, match=f"mnv4::native_program: .*{words}"):
        torch.ops.mnv4.native_program(*change(*call()))


def test_eight_threads_in_the_library() -> None:
    """The op lets go of Python's lock only inside of torch's own runners; here it is the library's locks that count."""
    m = model()
    run = mnv4_ops.export(m, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)).module()
    with torch.no_grad():
        want = run(X)
    ctypes.CDLL(str(mnv4_ops.native_library())).mnv4_ops_repack()

    def work(_: int) -> None:
        with torch.no_grad():
            for n in (2, 1, 2):
                torch.testing.assert_close(run(X[:n]), want[:n], rtol=1e-5, atol=1e-5)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8), timeout=100))


LOADED = """
import sys, torch, mnv4_ops
mnv4_ops.load_native_library()
run = torch._inductor.aoti_load_package(sys.argv[1])
x, want = torch.load(sys.argv[2])
for n in (2, 1):
    got = run(x[:n])
    assert torch.equal(got, want[n]), (got - want[n]).abs().max()
    assert got.shape == (n, 5)
# constants have the names that they have in the model
bias = torch.load(sys.argv[3])
run.load_constants({"classifier.weight": torch.zeros(5, 1280)}, check_full_update=False)
torch.testing.assert_close(run(x), bias.expand(2, 5), rtol=0, atol=0)
assert "timm" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMALL, "mobilenetv4_hybrid_medium_075"])
def test_an_aot_inductor_package_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    """The logits of the enabled model, bit by bit."""
    m = model(name)
    program = mnv4_ops.export(m, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save((X, {n: enabled(m, X[:n]) for n in (1, 2)}), tmp_path / "want.pt")
    torch.save(m.classifier.bias.detach(), tmp_path / "bias.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, package, str(tmp_path / "want.pt"), str(tmp_path / "bias.pt")],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_cpp_program_without_python(tmp_path: Path) -> None:
    """`examples/cpp_host` as its text says: the logits of the enabled model, bit by bit."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("waits for a C++ compiler")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONSAFEPATH": "1"}
    folder = EXAMPLES / "cpp_host"
    options = ["--model", SMALL, "--random-weights", "--size", "96"]
    for command in (
        [sys.executable, str(folder / "export.py"), "model.pt2", *options],
        ["sh", str(folder / "build.sh"), "host"],
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    library = str(mnv4_ops.native_library())
    needed = subprocess.run(["ldd", "host"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "libtorch_cpu" in needed
    assert "libpython" not in needed
    torch.manual_seed(0)
    m = timm.create_model(SMALL).eval()
    x = torch.linspace(-1, 1, 3 * 96 * 96).reshape(1, 3, 96, 96)
    want = enabled(m, x)[0]
    for threads in ("1", "2"):
        done = subprocess.run(
            ["./host", "model.pt2", library, "96", threads], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        got = torch.tensor([float(line) for line in done.stdout.split()])
        assert torch.equal(got, want)
        assert "ms a forward" in done.stderr
    # without the library: torch says that there is no such op
    done = subprocess.run(
        ["./host", "model.pt2", "/nonexistent.so"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "/nonexistent.so" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_the_library_needs_neither_python_nor_torch() -> None:
    library = mnv4_ops.native_library()
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout
    assert "torch" not in needed
    assert "python" not in needed
    assert "gomp" not in needed
    # loaded where there is no torch it says so and registers nothing
    code = f"import ctypes; ctypes.CDLL({str(library)!r})"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "expected a process with libtorch 2.10 or later" in done.stderr
