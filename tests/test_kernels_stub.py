"""`_core.pyi` says what the native library has: names, parameters, defaults, dictionaries."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from kernel_helpers import core

import mnv4_ops
from mnv4_ops import _native

pytestmark = pytest.mark.skipif(_native.core is None, reason="no native library")
# what the names of classes of 16-bit elements begin with, and the tier that has them
HALF = {"Half": "neon_fp16", "BFloat16": "neon_bf16"}


def _stub() -> ast.Module:
    return ast.parse(Path(mnv4_ops.__file__).with_name("_core.pyi").read_text())


def _signature(function: ast.FunctionDef) -> tuple[list[tuple[str, str | None]], list[tuple[str, str | None]]]:
    """(name, default) of the positional and of the keyword-only parameters, without self."""

    def value(node: ast.expr | None) -> str | None:
        return None if node is None else repr(ast.literal_eval(node))

    a = function.args
    defaults = [None] * (len(a.args) - len(a.defaults)) + list(a.defaults)
    positional = [(p.arg, value(d)) for p, d in zip(a.args, defaults, strict=True) if p.arg != "self"]
    return positional, [(p.arg, value(d)) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]


def _native_signature(function: Any) -> Any:
    # pybind11 writes the signature as valid Python into the first line
    line = inspect.getdoc(function).splitlines()[0]
    found = ast.parse(f"def {line}: ...").body[0]
    assert isinstance(found, ast.FunctionDef)
    return _signature(found)


def _public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def _defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def test_the_stub_names_everything_and_nothing_else() -> None:
    stub = _defined(_stub().body)
    typed = {name for name in stub if name.endswith("Info")}
    # only ARM has these: the classes of float32, without blobs
    plain = {f"{prefix}{kind}": kind for prefix in HALF for kind in ("Block", "MobileMQA", "Head", "Program")}
    assert plain.keys() == {name for name in stub if name.startswith(tuple(HALF))}
    tiers = core().cpu_info()["tiers"]
    absent = {name for name, kind in plain.items() if HALF[name.removesuffix(kind)] not in tiers}
    assert _public(stub) - typed - absent == _public(dir(core()))
    for name in stub.keys() - typed - absent:
        node = stub[plain.get(name, name)]
        if isinstance(node, ast.ClassDef):
            names = _public(_defined(node.body)) - ({"export_blob", "import_blob"} if name in plain else set())
            assert names == _public(dir(getattr(core(), name))), name


def test_the_stubs_signatures_are_the_librarys() -> None:
    for name, node in _defined(_stub().body).items():
        if isinstance(node, ast.FunctionDef):
            assert _signature(node) == _native_signature(getattr(core(), name)), name
        elif isinstance(node, ast.ClassDef) and hasattr(core(), name):
            for member, inner in _defined(node.body).items():
                native = inspect.getattr_static(getattr(core(), name), member)
                if isinstance(native, property):
                    assert isinstance(inner, ast.FunctionDef), (name, member)
                    assert [ast.unparse(d) for d in inner.decorator_list] == ["property"], (name, member)
                elif isinstance(inner, ast.FunctionDef):
                    assert _signature(inner) == _native_signature(native), (name, member)
                else:
                    assert isinstance(native, int), (name, member)


@pytest.mark.parametrize(("name", "call"), [("CpuInfo", "cpu_info"), ("BuildInfo", "build_info")])
def test_the_stubs_dictionaries(name: str, call: str) -> None:
    node = _defined(_stub().body)[name]
    assert isinstance(node, ast.ClassDef)
    types = {
        key: ast.unparse(item.annotation)
        for key, item in _defined(node.body).items()
        if isinstance(item, ast.AnnAssign)
    }
    found = getattr(core(), call)()
    assert set(types) == set(found)
    for key, value in found.items():
        assert isinstance(value, {"str": str, "int": int, "list[str]": list}[types[key]]), key
