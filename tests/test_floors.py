"""Contract: folders are floors, and imports go down only."""

import ast
import inspect
from pathlib import Path

import pytest

import jaxgd
from jaxgd._call.call import Call

ROOT = Path(jaxgd.__file__).parent
# From the roof to the ground.
FLOORS = (
    *("_tools", "_api", "_files", "_call", "_loop", "_result", "_rows", "_stop"),
    *("_problem", "_rules", "_devices", "_checks", "_tree"),
)
OUTSIDE = ("__init__", "problems")
ROOMS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.glob("**/*.py")
    if path.relative_to(ROOT).parts[0].removesuffix(".py") not in OUTSIDE
)


def imported(path):
    """Rooms and floors that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgd"):
            below = node.module.split(".")[1:]
            names = [below] if below else [[alias.name] for alias in node.names]
            yield from (name[0] for name in names if name[0] != "__version__")


def is_below(floor, other):
    return FLOORS.index(floor) <= FLOORS.index(other)


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_imports_go_down(room):
    floor = room.parts[0].removesuffix(".py")
    up = [other for other in imported(ROOT / room) if not is_below(floor, other)]
    assert not up, f"{room} imports from {up}"


def test_every_floor_is_there():
    assert {room.parts[0].removesuffix(".py") for room in ROOMS} == set(FLOORS)


def test_a_floor_does_not_import_from_above():
    assert not is_below("_rows", "_loop")
    assert is_below("_loop", "_rows")


def test_a_call_is_what_minimize_takes():
    taken = inspect.signature(jaxgd.minimize).parameters
    held = inspect.signature(Call).parameters
    assert list(taken) == list(held)
    for name, parameter in taken.items():
        assert parameter.default == held[name].default, name
