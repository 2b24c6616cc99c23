"""Claim: the inside can be read: 6,000 lines of code, short rooms and functions.

Lines are those of code: no comments, docstrings or blank lines. The heart is what has
to be read in one sitting: ``_problem``, ``_stop``, ``_loop``, the order of rows and
where they come from, and how optax is read. A first call of ``minimize`` is followed
with ``sys.setprofile``: into how many modules of the package it goes, and how many of
its calls lead from one of them into another, tracing of the program included.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import jaxgd
from benchmarks._measure import Options

ROOT = Path(jaxgd.__file__).parent
HEART = ("_problem/", "_stop/", "_loop/", "_rows/order", "_rows/resident")
HEART += ("_rules/adapter",)
LONG_ROOM, LONG_FUNCTION = 300, 60

_CALL = """
import sys
import jax, jax.numpy as jnp
import jaxgd
root = jaxgd.__file__.removesuffix("__init__.py")
entered, moves = set(), 0
def package_of(frame):
    while frame is not None:
        if frame.f_code.co_filename.startswith(root):
            return frame.f_code.co_filename
        frame = frame.f_back
def profile(frame, event, _):
    global moves
    name = frame.f_code.co_filename
    if event == "call" and name.startswith(root):
        entered.add(name)
        before = package_of(frame.f_back)
        moves += before is not None and before != name
x = jnp.ones((8, 2))
sys.setprofile(profile)
jaxgd.minimize(lambda p, rows: jnp.mean((rows @ p - 1) ** 2), jnp.zeros(2), x)
sys.setprofile(None)
print(len(entered), moves)
"""


def code_lines(text: str) -> set[int]:
    """The numbers of the lines that are neither blank, comment nor docstring."""
    words = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
    words |= {tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in words:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(
            getattr(first.value, "value", None), str
        ):
            found -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return found


def functions(text: str) -> Iterator[tuple[str, int]]:
    """(name, lines of code) of each function, those within it included."""
    lines = code_lines(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            its = range(node.lineno, (node.end_lineno or 0) + 1)
            yield node.name, len(lines.intersection(its))


def run(options: Options) -> list[dict]:
    del options
    texts = {
        str(path.relative_to(ROOT)).removesuffix(".py"): path.read_text()
        for path in sorted(ROOT.glob("**/*.py"))
    }
    rooms = {name: len(code_lines(text)) for name, text in texts.items()}
    heart = sum(lines for name, lines in rooms.items() if name.startswith(HEART))
    long_rooms = {name: n for name, n in rooms.items() if n > LONG_ROOM}
    long_ones = {
        f"{room}.{name}": lines
        for room, text in texts.items()
        for name, lines in functions(text)
        if lines > LONG_FUNCTION
    }
    done = subprocess.run(
        [sys.executable, "-c", _CALL], capture_output=True, text=True, check=True
    )
    entered, moves = map(int, done.stdout.split())
    rows = [
        {"name": "lines of code", "number": sum(rooms.values()), "at_most": 6000},
        {"name": "of them the heart", "number": heart, "at_most": 2200},
        {"name": f"rooms over {LONG_ROOM}", "number": len(long_rooms), "at_most": 0},
        {
            "name": f"functions over {LONG_FUNCTION}",
            "number": len(long_ones),
            "at_most": 2,
        },
        {"name": "modules that a call enters", "number": entered, "at_most": 10},
        {"name": "moves between them", "number": moves, "at_most": 150},
    ]
    for row in rows:
        print(f"  {row['name']:<28}{row['number']:>7,}   aim {row['at_most']:,}")
    for what in (long_rooms, long_ones):
        told = sorted(what.items(), key=lambda item: -item[1])
        print("  " + ", ".join(f"{name} {lines}" for name, lines in told))
    return rows
