"""The shape of the package, held by tests: the public surface, who may talk to the network, who may
print, and that ``import hubdiff`` stays light."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hubdiff

PACKAGE = Path(hubdiff.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Lowest first: a module imports at its top only from its own line or the ones before.
LAYERS = [
    {"_version", "errors", "progress", "refs", "markdown", "memory", "anatomy", "floats"}
    | {"graph", "registry_tags"},
    {
        "ranks",
        "files",
        "configs",
        "sidecars",
        "licences",
        "provenance",
        "fields",
        "names",
        "picture",
        "kernels",
    }
    | {"scales"},
    {"facts", "safetensors_io", "summary", "encodings", "numerics", "methods", "hub"},
    {"sample", "vocab"},
    {"checkpoint", "card"},
    {"rows"},
    {"manifest"},
    {"stream", "pair", "segment_delta"},
    {"adapter", "truncate"},
    {"hashing"},
    {"signing"},
    {"payloads", "writer", "nvcomp"},
    {"layers", "delta", "device"},
    {"forecast", "difference"},
    {"extract", "plan", "verdict", "forecast_picture"},
    {"compat", "lineage_page"},
    {"trimming", "dense", "quick", "factored", "row_layer"},
    {"combine"},
    {"merge", "peft_file"},
    {"lab"},
    {"jobs"},
    {"backport"},
    {"devhub", "toy_family"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]


def unit(path: Path) -> str:
    """The module or sub-package directly under hubdiff/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def top_level_imports(path: Path) -> set[str]:
    """What is imported when the module is, without what only type checkers see."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_public_surface_is_this():
    assert set(hubdiff.__all__) == {
        "HubdiffError",
        "__version__",
        "alias",
        "apply",
        "check",
        "compare",
        "connectivity",
        "diff",
        "evaluate",
        "export",
        "finetune",
        "inspect",
        "lineage",
        "list_deltas",
        "load",
        "open_delta",
        "push_delta",
        "recycle",
        "search",
        "sign",
        "tag",
        "tune_scale",
        "unpack",
        "verify",
    }
    for name in hubdiff.__all__:
        assert getattr(hubdiff, name) is not None
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted(set(hubdiff.__all__) - {"HubdiffError", "__version__"}))
def test_public_functions_are_typed_and_documented(name):
    function = getattr(hubdiff, name)
    assert len(inspect.getdoc(function)) > 60
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    order = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = unit(path)
    for imported in top_level_imports(path):
        parts = imported.split(".")
        if parts[0] == "hubdiff" and len(parts) > 1 and parts[1] in order:
            assert order[parts[1]] <= order[own], f"{own} imports {parts[1]}"


def test_every_module_has_a_layer():
    assert {unit(path) for path in MODULES} == set().union(*LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_one_place_talks_to_the_hub(path):
    clients = ("huggingface_hub", "httpx2", "httpx", "requests", "urllib.request", "socket")
    tree = ast.parse(path.read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    talkers = {name for name in imported if name.split(".")[0] in clients or name in clients}
    # The demo and devhub are servers; github.py talks to GitHub, with what Python has.
    if path.relative_to(PACKAGE).as_posix() == "backport/github.py":
        talkers -= {"urllib.request"}
    if unit(path) not in {"hub", "devhub", "demo"}:
        assert not talkers


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_command_line_prints_or_exits(path):
    if unit(path) == "cli" or path.name == "__main__.py":
        return
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    assert not calls & {"print", "sys.exit", "exit", "sys.stdout.write", "sys.stderr.write"}


def loaded(module: str, heavy: set[str]) -> set[str]:
    """Which of ``heavy`` are there after ``module`` is imported by a Python of its own."""
    code = f"import sys, {module}; print(*{{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return heavy & {*done.stdout.split()}


def test_importing_hubdiff_is_light():
    assert not loaded("hubdiff", {"torch", "transformers", "numpy", "huggingface_hub"})


@pytest.mark.parametrize("stage", ["watch", "gate", "publish", "record", "report"])
def test_only_the_stage_that_makes_deltas_loads_what_makes_them(stage):
    """`run` alone has no right to write anywhere."""
    makers = {"numba", "torch", "hubdiff.jobs.push", "hubdiff.jobs.apply", "hubdiff.merge"}
    assert not loaded(f"hubdiff.backport.{stage}", makers)
    assert loaded("hubdiff.backport.run", makers) >= {"numba", "hubdiff.jobs.push"}
