"""Shared fixtures: a compile counter, 64-bit numbers, a headless Matplotlib."""

import contextlib
import os

os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

from jaxgd import _rows

_compilations = 0


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
