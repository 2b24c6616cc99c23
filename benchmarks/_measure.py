"""How the benchmarks measure: every peer in one process, in turn, compilation apart.

A benchmark hands ``compare`` one function for jaxgd and one for each peer, all of which
do the same work. Each is called once to compile and to see that its parameters agree
with those of jaxgd, then all of them in turn, several times. A ratio is the median over
the turns of the peer's time by jaxgd's, so that what else the machine does falls on
both.
"""

import importlib
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Options:
    """How much to measure, and where."""

    quick: bool = False
    scale: float = 1.0  # sizes by this factor
    device: str = "cpu"
    cores: int | None = None  # None: all there are

    @property
    def repeats(self) -> int:
        return 5 if self.quick else 11

    def rows(self, n: int) -> int:
        """A number of rows at the scale asked for."""
        return max(int(n * self.scale), 1)

    def steps(self, n: int) -> int:
        """A number of steps, fewer of them where it should be quick."""
        return max(n // 4 if self.quick else n, 1)


class Missing(Exception):
    """A peer that is not there: its name and why."""


def needs(package: str) -> Any:
    """The module of a peer, or ``Missing``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jaxopt tells that it is not maintained
            return importlib.import_module(package)
    except ImportError as error:
        raise Missing(f"{package} is not installed") from error


def compare(
    name: str,
    size: str,
    options: Options,
    jaxgd: Callable[[], Any],
    peers: dict[str, Callable[[], Callable[[], Any]]],
    *,
    units: int,
    unit: str = "step",
    agree: float | None = 1e-3,
    alike: tuple = (),
) -> list[dict]:
    """Rows of the report: jaxgd against each peer.

    Args:
      jaxgd: does ``units`` units of the work and returns the parameters reached.
      peers: by name, a maker of the same; it may raise ``Missing``.
      agree: largest difference of parameters, relative to their largest entry, for
        all peers but those named in ``alike``, whose work is alike, not the same.
    """
    runs = {"jaxgd": jaxgd}
    for peer, maker in peers.items():
        try:
            runs[peer] = maker()
        except Missing as missing:
            print(f"  {name}: {peer} skipped, {missing}")
    reached = {peer: flat(run()) for peer, run in runs.items()}
    own, apart = reached["jaxgd"], {}
    for peer, found in reached.items():
        if agree is None or peer in alike:
            continue
        off = np.abs(found - own).max() / max(np.abs(own).max(), 1e-30)
        if not off <= agree:
            print(f"  {name}: {peer} ends {off:.1e} from jaxgd")
            apart[peer] = float(off)
    seconds = interleaved(runs, options.repeats)
    each = {peer: times / units for peer, times in seconds.items()}
    return rows_of(name, size, unit, each, apart)


def rows_of(
    name: str, size: str, unit: str, seconds: dict, apart: dict | None = None
) -> list[dict]:
    """Rows of the report, from the seconds a unit of each: ``(repeats,)``."""
    rows = []
    for peer in [peer for peer in seconds if peer != "jaxgd"] or [None]:
        row = {"name": name, "size": size, "peer": peer, "unit": unit}
        row["jaxgd"] = float(np.median(seconds["jaxgd"]))
        if peer is not None:
            ratios = seconds[peer] / seconds["jaxgd"]
            row["peer_time"] = float(np.median(seconds[peer]))
            row["ratio"] = float(np.median(ratios))
            row["spread"] = [float(q) for q in np.quantile(ratios, [0.25, 0.75])]
        if apart and peer in apart:
            row["disagrees"] = apart[peer]
        rows.append(row | where())
        show(rows[-1])
    return rows


def interleaved(runs: dict, repeats: int) -> dict:
    """Seconds of each run, (repeats,), taken in turn."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return {name: np.array(times) for name, times in seconds.items()}


def timed(run: Callable[[], Any]) -> float:
    """Seconds until the result of a call is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def flat(tree) -> np.ndarray:
    """All numbers of a pytree as one vector of float64."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def where() -> dict:
    """What a time depends on: device and versions."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        cores = usable_cores()
        kind = f"CPU, {cores} core{'s' if cores > 1 else ''}"
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"device": kind, "versions": versions}


PACKAGES = (
    "jaxgd",
    "jax",
    "jaxlib",
    "optax",
    "numpy",
    "scipy",
    "jaxopt",
    "optimistix",
    "scikit-learn",
    "torch",
)


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


HEAD = f"  {'':34} {'':20} {'peer':22} {'jaxgd':>9} {'peer':>9} {'ratio':>7}  quartiles"


def show(row: dict) -> None:
    """One line of the table: a ratio above 1 means that jaxgd is faster."""
    line = f"  {row['name']:34} {row['size']:20} {row['peer'] or '':22}"
    line += f" {seconds_text(row['jaxgd']):>9}"
    if "ratio" in row:
        low, high = row["spread"]
        line += f" {seconds_text(row['peer_time']):>9} {row['ratio']:7.2f}"
        line += f"  {low:.2f} - {high:.2f}"
    print(line, flush=True)


def seconds_text(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
