"""Imports go one way: no circle in the package, and inside `optim` and between the folders only downwards."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "anon_dist"

FOLDERS = (
    ("files", "machine", "launcher", "columns", "page", "outages", "exits"),
    ("stores", "refusal", "usage"),
    ("arguments", "named"),
    ("agreement", "optim"),
    ("data",),
    ("checkpoint",),
    ("engines",),
    ("train",),
    ("sweep", "bench", "trained"),
    ("doctor",),
    ("completion",),
    ("cli",),
)
"""From the lowest. A folder imports none that comes later, nor its neighbour."""

OPTIM = (
    ("schedule", "rounding", "update", "plan", "groups", "host_copy", "reference", "basis"),
    ("frame", "scaling"),
    ("flat",),
    ("state", "matching"),
    ("hyper",),
    ("regime",),
    ("backends.layout", "backends.build", "backends.gpu_layout"),
    ("backends.foreach", "backends.cpu", "backends.gpu_step"),
    ("backends.gpu",),
    ("backends.choice", "gather"),
    ("members", "turned"),
    ("hidden", "flat_step"),
    ("stepper", "rebase"),
    ("saving",),
    ("anon",),
    ("monitor",),
)
"""The same of the optimizer's modules."""


def modules():
    """Module → the modules of the package that it imports, wherever in its text."""
    names = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    found = {}
    for name, path in names.items():
        imports = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anon_dist"):
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                imports |= {f if f in names else node.module for f in full}
            elif isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names if alias.name in names}
        found[name] = imports - {name}
    return found


def test_there_is_no_circle():
    try:
        list(TopologicalSorter(modules()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def level(layers, name):
    return next(i for i, layer in enumerate(layers) if name in layer)


@pytest.mark.parametrize(("prefix", "layers"), [("anon_dist.", FOLDERS), ("anon_dist.optim.", OPTIM)])
def test_imports_go_down(prefix, layers):
    def place(module):
        rest = module.removeprefix(prefix)
        return rest.split(".")[0] if layers is FOLDERS else rest

    inside = {m: i for m, i in modules().items() if m.startswith(prefix) and m != "anon_dist.optim.backends"}
    for module, imports in inside.items():
        for other in imports & set(inside):
            if place(module) != place(other):
                assert level(layers, place(other)) < level(layers, place(module)), f"{module} imports {other}"


def test_no_backend_imports_another_or_the_optimizer():
    found = modules()
    backends = ("foreach", "cpu", "gpu")
    for name in backends:
        others = {f"anon_dist.optim.backends.{b}" for b in backends if b != name} | {"anon_dist.optim.anon"}
        assert not found[f"anon_dist.optim.backends.{name}"] & others
