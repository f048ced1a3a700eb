"""What the package holds, and that every way of installing it gives the same modules and data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = "mnv4_ops/triton_kernels/tuned/index.json"
OUTER_SITE = sysconfig.get_paths()["purelib"]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout")


def _run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MNV4_OPS_")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _checked(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = _run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _make_venv(folder: Path) -> Path:
    """A venv without pip and without our package that sees torch and the rest of the running environment last."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = _checked(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    # a .pth adds the folder alone: an editable finder of the outer environment does not come along
    (Path(site) / "outer.pth").write_text(OUTER_SITE + "\n")
    return python


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make_venv(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the checkout: what git tracks or would track."""
    listed = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode == 0 and listed.stdout:
        names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:  # an unpacked sdist
        skip = ("build", "dist")
        files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [
            path.as_posix()
            for path in files
            if path.parts[0] not in skip
            and not any(part.startswith(".") or part == "__pycache__" for part in path.parts)
            and path.suffix not in (".so", ".pyc")
        ]
    copy = tmp_path_factory.mktemp("checkout") / "mnv4_ops"
    for name in names:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def archives(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that an isolated build (no torch there) makes of that sdist."""
    out = tmp_path_factory.mktemp("dist")
    _checked(sys.executable, "-m", "build", "--outdir", out, checkout, cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def _package_files(root: Path) -> set[str]:
    """Files of the package under `root`, by their installed names."""
    found = set()
    for folder, name in (("mnv4_ops", "mnv4_ops"), ("triton_kernels", "mnv4_ops/triton_kernels")):
        for path in (root / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(f"{name}/{path.relative_to(root / folder).as_posix()}")
    return found


def _modules(files: set[str]) -> list[str]:
    names = {name.removesuffix(".py").removesuffix("/__init__") for name in files if name.endswith(".py")}
    return sorted(name.replace("/", ".") for name in names)


PROBE = """
import importlib.metadata, importlib.util, json, sys
from importlib import resources
import mnv4_ops
from mnv4_ops import _native
assert _native.core is not None, _native.reason
names = json.loads(sys.argv[1])
try:
    import triton_kernels
    top_level = True
except ImportError:
    top_level = False
print(json.dumps({
    "version": mnv4_ops.__version__,
    "missing": [name for name in names if importlib.util.find_spec(name) is None],
    "top_level": top_level,
    "data": resources.files("mnv4_ops.triton_kernels").joinpath("tuned", "index.json").read_text(),
    "typed": resources.files("mnv4_ops").joinpath("py.typed").is_file(),
    "stub": resources.files("mnv4_ops").joinpath("_core.pyi").is_file(),
    "tiers": _native.core.cpu_info()["tiers"],
    "script": importlib.metadata.entry_points(group="console_scripts", name="mnv4-ops")["mnv4-ops"].value,
}))
"""


def _probe(python: Path, files: set[str], cwd: Path) -> dict[str, object]:
    return json.loads(_checked(python, "-c", PROBE, json.dumps(_modules(files)), cwd=cwd, PYTHONPATH=""))


@pytest.mark.install
@pytest.mark.slow
def test_sdist_and_wheel_hold_the_same_files(checkout: Path, archives: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = archives
    with tarfile.open(sdist) as archive:
        # Debian 12's Python 3.11.2 has no filters yet
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    native = {name for name in names if name.startswith("mnv4_ops/") and name.endswith(".so")}
    metadata = {name for name in names if ".dist-info/" in name}

    # the Python module, and the op for C++ hosts
    assert len(native) == 2
    assert "mnv4_ops/libmnv4_ops_torch.so" in native
    assert any(name.startswith("mnv4_ops/_core.") for name in native)
    assert DATA in names
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert {name.split("/")[0] for name in names - metadata} == {"mnv4_ops"}
    assert names - native - metadata == _package_files(unpacked) == _package_files(checkout)
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "CHANGELOG.md", "tests/conftest.py"):
        assert (unpacked / name).is_file(), name
    for folder in ("csrc", "tests"):
        inside = {path.relative_to(checkout) for path in (checkout / folder).rglob("*") if path.is_file()}
        assert inside == {path.relative_to(unpacked) for path in (unpacked / folder).rglob("*") if path.is_file()}


@pytest.mark.install
@pytest.mark.slow
def test_wheel_and_editable_installs_import_the_same(
    checkout: Path, archives: tuple[Path, Path], tmp_path: Path
) -> None:
    files = _package_files(checkout)
    results = []
    for name, source in (("wheel", [archives[1]]), ("editable", ["-e", checkout])):
        python = _make_venv(tmp_path / name)
        # the outer environment may hold the same version
        options = ("--no-deps", "--ignore-installed")
        pip = (sys.executable, "-m", "pip", "--python", python)
        _checked(*pip, "install", *options, *source, cwd=tmp_path, PYTHONPATH="")
        results.append(_probe(python, files, tmp_path))
    assert results[0] == results[1]
    assert results[0]["missing"] == []
    assert not results[0]["top_level"]
    assert results[0]["typed"]
    assert results[0]["stub"]
    assert results[0]["script"] == "mnv4_ops.cli:main"


def _bare_package(checkout: Path, folder: Path) -> Path:
    target = folder / "mnv4_ops"
    for path in (checkout / "mnv4_ops").rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(checkout / "mnv4_ops")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def test_bare_source_tree_says_how_to_install(checkout: Path, bare_python: Path, tmp_path: Path) -> None:
    _bare_package(checkout, tmp_path)
    done = _run(bare_python, "-c", "import mnv4_ops", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "pip install ." in done.stderr


def test_skip_native_imports_without_the_library(checkout: Path, bare_python: Path, tmp_path: Path) -> None:
    _bare_package(checkout, tmp_path)
    code = "import mnv4_ops; from mnv4_ops import _native; assert _native.core is None; print(_native.reason)"
    done = _run(
        bare_python, "-W", "error", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path), MNV4_OPS_SKIP_NATIVE="1"
    )
    assert done.returncode == 0, done.stderr
    assert "MNV4_OPS_SKIP_NATIVE" in done.stdout


@pytest.mark.parametrize("suffix", [sysconfig.get_config_var("EXT_SUFFIX"), ".cpython-20-other-linux-gnu.so"])
def test_library_that_cannot_be_loaded_warns_once(
    checkout: Path, bare_python: Path, tmp_path: Path, suffix: str
) -> None:
    (_bare_package(checkout, tmp_path) / f"_core{suffix}").write_bytes(b"not a library")
    code = "import mnv4_ops; from mnv4_ops import _native; assert _native.core is None; print(_native.reason)"
    done = _run(bare_python, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "original forwards" in done.stderr
    assert "_core" in done.stdout


def test_original_forward_runs_without_the_library(checkout: Path, bare_python: Path, tmp_path: Path) -> None:
    _bare_package(checkout, tmp_path)
    code = (
        "import torch, timm, mnv4_ops\n"
        "model = timm.create_model('mobilenetv4_conv_small_035').eval()\n"
        "x = torch.rand(1, 3, 64, 64)\n"
        "with torch.inference_mode():\n"
        "    before = model(x)\n"
        "    mnv4_ops.enable()\n"
        "    assert torch.equal(model(x), before)\n"
    )
    pytest.importorskip("timm")
    _checked(bare_python, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path), MNV4_OPS_SKIP_NATIVE="1")


def test_unknown_tier_lists_the_available_ones(tmp_path: Path) -> None:
    done = _run(sys.executable, "-c", "import mnv4_ops", cwd=tmp_path, MNV4_OPS_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "ValueError: MNV4_OPS_CPU_ISA='mmx'" in done.stderr
    assert "scalar" in done.stderr


def test_import_needs_neither_timm_nor_triton(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('timm', 'torchvision', 'triton', 'onnxruntime', 'openvino'): sys.modules[name] = None\n"
        "import mnv4_ops, mnv4_ops.triton_kernels\n"
        "mnv4_ops.enable(); mnv4_ops.disable()\n"
        "mnv4_ops.spec; mnv4_ops.ops; mnv4_ops.reference\n"
    )
    _checked(sys.executable, "-c", code, cwd=tmp_path)


def test_import_of_the_package_imports_no_optional_package(tmp_path: Path) -> None:
    code = (
        "import sys, mnv4_ops; mnv4_ops.enable(); print(sorted({'timm', 'torchvision', 'skimage'} & set(sys.modules)))"
    )
    assert _checked(sys.executable, "-c", code, cwd=tmp_path).strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_library_adds_no_openmp_runtime(tmp_path: Path) -> None:
    code = (
        "def runtimes():\n"
        "    names = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        "    return {n for n in names if any(part in n for part in ('/libgomp', '/libomp', '/libiomp'))}\n"
        "import torch\n"
        "before = runtimes()\n"
        "import mnv4_ops\n"
        "from mnv4_ops import _native\n"
        "found = _native.core.openmp_runtime()\n"
        "assert runtimes() == before, runtimes() - before\n"
        "assert found in before, (found, before)\n"
        "assert 'torch' in found, found\n"
    )
    _checked(sys.executable, "-c", code, cwd=tmp_path)
