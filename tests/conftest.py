"""Two tiers, a compile counter, 64-bit numbers, a headless Matplotlib.

``pytest`` runs the quick tier, ``pytest -m ''`` all. A test marked ``full`` is not in
the quick one; of one marked ``thin(n)``, every n-th of its cases is. What compares bits
of different programs, or steps that rounding leads, is marked ``optimized``: it needs
the programs that users have.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

from jaxgd._rows import order as _rows

# For benchmarks, which are no part of the package: behind the installed one.
sys.path.append(str(Path(__file__).parent.parent))

_compilations = 0
_CACHE = pytest.StashKey[str]()


def pytest_configure(config):
    """Most of the time was XLA optimizing programs that run once.

    It does next to nothing where the marker expression has a "not"; ``-m ''`` and
    ``-m optimized`` run the programs that users have. Here is early enough: JAX reads
    the flags where it finds devices.
    """
    flags = []
    if version("jaxlib").startswith(("0.10.", "0.11.")):  # later ones do not know it
        flags.append("--xla_cpu_use_fusion_emitters=false")
    if "not" in config.option.markexpr:
        flags.append("--xla_backend_optimization_level=0")
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
    # Processes that compile the same share it: workers, and those that tests begin.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.stash[_CACHE] = folder = tempfile.mkdtemp()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_unconfigure(config):
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    cases = {}
    for item in items:
        thin = item.get_closest_marker("thin")
        if thin is not None:
            test = item.nodeid.split("[")[0]
            case = cases[test] = cases.get(test, -1) + 1
            if case % thin.args[0]:
                item.add_marker(pytest.mark.full)


def _listen(event, duration, **_):
    global _compilations
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture
def count_compilations():
    """``with count_compilations() as count: ...; count()``"""

    @contextlib.contextmanager
    def counting():
        before = _compilations
        yield lambda: _compilations - before

    return counting


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Programs of 2000 tests take 8 GB a process; modules share next to none."""
    yield
    jax.clear_caches()
    _rows._key_of_seed.cache_clear()  # a known seed hides that the next must compile
