"""What the documentation shows is run."""

import doctest
import inspect
import os
import re
from pathlib import Path

import pytest

import jaxgd

README = Path(__file__).parent.parent / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]
PUBLIC = {
    name: thing for name, thing in vars(jaxgd).items() if not name.startswith("_")
}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}


def test_the_readme_is_filled_in():
    assert "@@" not in README.read_text()


def examples_of(thing, name):
    """The doctests of a public name, of its public methods too."""
    finder = doctest.DocTestFinder(recurse=not inspect.ismodule(thing))
    tests = finder.find(thing, name, module=False, globs={})
    return [test for test in tests if test.examples]


def run(tests):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = []
    for test in tests:
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
    return runner.tries


def test_there_are_public_names():
    assert {"minimize", "make_step", "Result", "gradient_norm", "problems"} <= set(
        PUBLIC
    )
    assert len(FUNCTIONS) >= 10


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    thing = PUBLIC[name]
    # Not inherited, and not the signature that a dataclass makes up.
    text = vars(thing).get("__doc__") or ""
    text = text or (thing.__doc__ or "" if inspect.isfunction(thing) else "")
    assert text.strip()
    assert not text.startswith(f"{name}(")
    summary = text.strip().split("\n\n")[0]
    assert summary.splitlines()[0][-1] in ".,:;" or summary.endswith((".", ":"))
    for method, value in vars(thing).items() if inspect.isclass(thing) else ():
        if not method.startswith("_") and callable(value) and inspect.isfunction(value):
            assert (value.__doc__ or "").strip() or name in ("Check",), method


@pytest.mark.full
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example_that_runs(name):
    tests = examples_of(FUNCTIONS[name], name)
    assert "Example:" in FUNCTIONS[name].__doc__
    assert run(tests) >= 2


@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in FUNCTIONS])
def test_the_examples_of_classes_and_modules_run(name):
    tests = examples_of(PUBLIC[name], name)
    if not tests:
        pytest.skip("no example")
    run(tests)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, f in vars(jaxgd.problems).items()
        if inspect.isfunction(f) and n[0] != "_"
    ],
)
def test_problems_are_documented(name):
    function = getattr(jaxgd.problems, name)
    if function.__module__ == jaxgd.problems.__name__:
        assert (function.__doc__ or "").strip()
        run(examples_of(function, name))


def blocks(text):
    """(line, code) of each fenced block of Python."""
    found = re.finditer(r"^```python[^\n]*\n(.*?)^```", text, re.M | re.S)
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in found]


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny = x\n```\n"
    assert blocks(text) == [(2, "x = 1\n"), (8, "y = x\n")]


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page, tmp_path, monkeypatch):
    found = blocks(page.read_text())
    assert found
    if any("sklearn" in code for _, code in found):
        pytest.importorskip("sklearn")
    if any("plot" in code for _, code in found):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert os.environ["MPLBACKEND"] == "Agg"
    namespace = {"__name__": "page"}
    for line, code in found:
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(
                code, namespace, page.name, str(page), line
            )
            run([test])
            continue
        # The line numbers of an error are those of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
