"""Which part of the package may know which: no circles, and each room sees only those below it."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import dq_hf

ROOT = Path(dq_hf.__file__).parent
GROUND_TO_TOP = [  # a room may import those of the rows before its own, and itself
    {"assets", "hub", "data", "networks", "quiet", "refusals"},
    {"modeling"},
    {"pipelines", "codec", "release"},
    {"public"},
    {"training", "metrics", "loading"},
    {"pictures"},
    {"demo"},
    {"scripts", "commands"},
]
ALLOWED_BESIDES = {("networks", "data"), ("codec", "pipelines"), ("commands", "scripts")}  # within a row


def modules():
    """{name: path} of all modules of the package."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name):
    """Modules of the package that one of them imports, at the top or in a function."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if full in MODULES or module in MODULES:
                    found.add(full if full in MODULES else module)
    return found - {name}


GRAPH = {name: imports_of(name) for name in MODULES}


def room_of(name):
    """The part of the package that a module is in."""
    return name.split(".")[1] if "." in name else name


def test_there_is_no_circle_of_imports():
    try:
        tuple(graphlib.TopologicalSorter(GRAPH).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("room", sorted({room_of(name) for name in MODULES} - {"dq_hf", "__main__"}))
def test_a_room_sees_only_those_below_it(room):
    (height,) = [i for i, row in enumerate(GROUND_TO_TOP) if room in row]
    below = set().union(*GROUND_TO_TOP[:height], {room}) | {other for one, other in ALLOWED_BESIDES if one == room}
    if height > GROUND_TO_TOP.index({"public"}):
        below.add("dq_hf")
    for name in MODULES:
        if room_of(name) == room:
            assert {room_of(other) for other in GRAPH[name]} <= below, name


def test_a_configuration_imports_no_sampler():
    found, new = set(), {name for name in MODULES if name.startswith("dq_hf.modeling.configuration_")}
    while new:
        found |= new
        new = set().union(*(GRAPH[name] for name in new)) - found
    assert "dq_hf.modeling.text_dq" in found and "dq_hf.modeling.generation_dq" not in found


def test_the_graph_is_that_of_the_package():
    """So that the tests above cannot pass by seeing nothing."""
    assert "dq_hf.modeling.modeling_dqvae" in GRAPH["dq_hf.modeling.modeling_dq"]
    assert sum(map(len, GRAPH.values())) > 100
    assert set(MODULES) >= {name for name in sys.modules if name.split(".")[0] == "dq_hf"}
