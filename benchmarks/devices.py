"""Claim: rows split over devices cost one all-reduce a step and change no result.

The same runs on one device and with their rows split over 2, 4 and 8 devices of this
process, over two processes of 1 and of 4, on meshes of several kinds, inside a user's
jit, with parameters that are split as well, and with an objective that couples rows.
All devices are the CPU, forced into as many (``xla_force_host_platform_device_count``),
processes talk over gloo: the times tell what a step costs beyond its arithmetic where
devices share two cores, not how it scales.

- Collectives in the compiled step, and the bytes they reduce (aim: one all-reduce, of
  gradient and value together; the root of a mean needs two, parameters that are split
  need those of the model). All-reduces in a full pass (one for each block of rows).
- The largest difference of any parameter from the run of one device with the same
  strata, after 200 steps (aim: at most 1e-5).
- Time per step, median of five, launch and compilation removed.

    python -m benchmarks.devices [--write docs/scaling.md] [--json FILE]

``--write`` puts the table between the two comments that name this command.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

STEPS, STRATA, ROWS, BATCH = 200, 8, 8192, 64
_SECONDS = 600  # of wall time for one group of runs
_ON = "<!-- made by `python -m benchmarks.devices --write docs/scaling.md` -->"
_OFF = "<!-- end of that table -->"


class Group(NamedTuple):
    """Runs that share their devices."""

    processes: int
    devices: int  # of each process
    places: tuple  # where the rows are


GROUPS = (
    Group(1, 1, ("one device",)),
    Group(1, 2, ("shard_rows",)),
    Group(1, 4, ("shard_rows",)),
    Group(1, 8, ("shard_rows", "own mesh", "own mesh 4 x 2", "explicit mesh", "jit")),
    Group(2, 1, ("shard_rows",)),
    Group(2, 4, ("shard_rows",)),
)
# Beside shard_rows, places are compared on one run.
_ONE = "MLP, Adam"
_SEVERAL = ("logistic, SGD", "MLP, Adam")  # of what processes run


def runs() -> dict:
    """{name: (problem, arguments)}"""
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxgd import problems

    logistic = problems.logistic(*problems.blobs(ROWS, 20, 2))
    mlp = problems.mlp(*problems.blobs(ROWS, 64, 10), sizes=(64, 32, 10))
    rng = np.random.default_rng(0)
    words = rng.integers(0, 4096, (ROWS, 4)).astype(np.int32)
    target = rng.normal(size=ROWS).astype(np.float32)
    table = {
        "embedding": 0.1 * rng.normal(size=(4096, 16)).astype(np.float32),
        "head": 0.1 * rng.normal(size=16).astype(np.float32),
    }

    def words_loss(params, batch):
        ids, y = batch
        seen = jnp.sum(params["embedding"][ids], axis=1)
        return jnp.mean((seen @ params["head"] - y) ** 2)

    split = problems.Problem(
        "embedding", words_loss, table, (words, target), None, None
    )
    root = logistic._replace(fun=lambda p, batch: jnp.sqrt(logistic.fun(p, batch)))
    small: dict[str, Any] = {"batch_size": BATCH, "strata": STRATA}
    sgd, adam = {"learning_rate": 0.1}, {"optimizer": optax.adam, "learning_rate": 1e-2}
    momentum = {
        "optimizer": optax.sgd,
        "learning_rate": 0.02,
        "hyperparams": {"momentum": 0.9},
    }
    return {
        "logistic, SGD": (logistic, small | sgd),
        "logistic, all rows": (logistic, sgd),
        "MLP, momentum": (mlp, small | momentum),
        "MLP, Adam": (mlp, small | adam),
        "MLP, SGD, microbatches of 32": (mlp, small | sgd | {"microbatch_size": 32}),
        "root of a mean (couples rows)": (root, small | sgd),
        "embedding, split as well": (split, small | momentum),
    }


def wanted(group: Group, place: str, name: str) -> bool:
    if group.processes > 1:
        return name in _SEVERAL
    return place in ("one device", "shard_rows") or name == _ONE


# One process


def placed(place: str, data):
    """The rows where ``place`` says: those of this process, of several."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxgd

    if place == "one device":
        return jax.device_put(data)
    if place in ("shard_rows", "jit"):
        count = ROWS // jax.process_count()
        first = jax.process_index() * count
        own = jax.tree.map(lambda x: np.asarray(x)[first : first + count], data)
        return jaxgd.shard_rows(own)
    shape, names = ((4, 2), ("a", "b")) if "4 x 2" in place else ((8,), ("a",))
    kind = AxisType.Explicit if "explicit" in place else AxisType.Auto
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    return jax.device_put(data, NamedSharding(mesh, P(names)))


def spread(params, data):
    """The first leaf split over the devices of the rows."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.tree.leaves(data)[0].sharding.mesh
    axes = {"embedding": P(mesh.axis_names), "head": P()}
    return jax.device_put(params, {k: NamedSharding(mesh, v) for k, v in axes.items()})


def marked(problem, rows: int):
    """The objective, with its operations named where it sees the rows of a step."""
    import jax

    from benchmarks.ahead_of_time import MARK

    def objective(params, batch):
        with jax.named_scope(MARK if len(batch[0]) == rows else "rows_of_a_pass"):
            return problem.fun(params, batch)

    return objective


def measured(name: str, place: str, problem, how: dict) -> dict:
    """One run: what is compiled, where it ends, and how long a step takes."""
    import jax
    import numpy as np

    import jaxgd
    from benchmarks.ahead_of_time import read
    from jaxgd._call.arguments import checked
    from jaxgd._call.call import Call
    from jaxgd._files.resume import begin
    from jaxgd._loop.program import go

    devices = jax.device_count()
    data, params = placed(place, problem.data), problem.init
    if name.startswith("embedding") and place != "one device":
        params = spread(params, data)
    seen = how.get("microbatch_size") or how.get("batch_size") or ROWS
    fun = marked(problem, seen)

    def call(params, data, steps, **other):
        return jaxgd.minimize(fun, params, data, max_steps=steps, **how, **other)

    if place == "jit":
        compiled = jax.jit(call).lower(params, data, np.int32(STEPS)).compile()
        minimize = jax.jit(call, static_argnames="final_evaluation")
    else:
        given = Call(fun, params, data, **{"max_steps": STEPS} | how)
        spec, numbers, limit = checked(given)
        compiled = go.lower(spec, numbers, begin(spec, numbers), limit).compile()
        minimize = call
    text = compiled.as_text() or ""
    result = minimize(params, data, np.int32(STEPS))
    flat = [np.ravel(x) for x in jax.tree.leaves(result.params)]
    steps = 2000 if devices == 1 else 400 if jax.process_count() == 1 else 60

    def seconds(count):
        start = time.perf_counter()
        last = minimize(params, data, np.int32(count), final_evaluation=False)
        jax.block_until_ready(last.params)
        return time.perf_counter() - start

    seconds(1)
    times = [(seconds(STEPS + steps) - seconds(STEPS)) / steps for _ in range(5)]
    found = read(text) if devices > 1 else {}
    return {
        "name": name,
        "place": place,
        "reduces_per_step": max(found.get("reduces_per_step", [0])),
        "reduced_bytes": reduced_bytes(text) if devices > 1 else 0,
        "moves": found.get("sorts_and_moves", 0),
        "reduces_of_pass": found.get("reduces_of_pass", 0),
        "params": np.concatenate(flat).tolist(),
        "step_s": float(np.median(times)),
    }


def reduced_bytes(text: str) -> int:
    """Of the largest all-reduce in a program."""
    sizes = {"pred": 1, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "bf16": 2, "f16": 2}
    found = [0]
    for shape in re.findall(r"= (.*?) all-reduce(?:-start)?\(", text):
        one = 0
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape):
            size = sizes[dtype]
            for dim in filter(None, dims.split(",")):
                size *= int(dim)
            one += size
        found.append(one)
    return max(found)


def work(group: Group, index: int, port: int) -> list[dict]:
    """All runs of a group, in this process."""
    import jax

    if group.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes=group.processes, process_id=index
        )
    rows = []
    for name, (problem, how) in runs().items():
        for place in group.places:
            if wanted(group, place, name):
                rows.append(measured(name, place, problem, how))
                if index == 0:
                    print(".", end="", file=sys.stderr, flush=True)
    return rows


# All of them


def started(group: Group, folder: str) -> list[dict]:
    """The rows of a group, from processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flag = f"--xla_force_host_platform_device_count={group.devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "benchmarks.devices", "--worker"]
    command += [str(GROUPS.index(group)), str(port)]
    files = [Path(folder) / f"{port}-{i}.json" for i in range(group.processes)]
    running = [
        subprocess.Popen([*command, str(i), "--json", str(file)], env=env)
        for i, file in enumerate(files)
    ]
    try:
        for process in running:
            if process.wait(timeout=_SECONDS):
                raise RuntimeError(f"{group} failed: see above")
    finally:
        for process in running:
            process.kill()
    found = [json.loads(file.read_text()) for file in files]
    for rows in found[1:]:
        for mine, first in zip(rows, found[0], strict=True):
            if mine["params"] != first["params"]:
                raise RuntimeError(f"processes do not agree on {mine['name']}")
    about = {"processes": group.processes, "devices": group.processes * group.devices}
    return [row | about for row in found[0]]


def report(groups=GROUPS) -> list[dict]:
    """One row for each run, with its distance from the run of one device."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for group in groups for row in started(group, folder)]
    print(file=sys.stderr)
    single = {row["name"]: row for row in rows if row["devices"] == 1}
    for row in rows:
        one = single[row["name"]]
        pairs = zip(row["params"], one["params"], strict=True)
        row["away"] = max(abs(a - b) for a, b in pairs)
        row["times_one"] = row["step_s"] / one["step_s"]
    return [{k: v for k, v in row.items() if k != "params"} for row in rows]


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| run | rows | all-reduces a step | bytes | others | a full pass "
        "| away from one device | a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: list(runs()).index(row["name"])):
        devices, processes = row["devices"], row["processes"]
        where = f"{devices} devices, {row['place']}"
        if processes > 1:
            where = f"{processes} processes of {devices // processes}, {row['place']}"
        if devices == 1:
            where = "one device"
        away = "-" if devices == 1 else f"{row['away']:.1e}"
        step = f"{row['step_s'] * 1e6:.0f} us"
        numbers = ["reduces_per_step", "reduced_bytes", "moves", "reduces_of_pass"]
        cells = [row["name"], where, *[f"{row[key]:,}" for key in numbers], away, step]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def failures(rows: list[dict]) -> list[str]:
    """What is not as the claim has it."""
    bad = []
    for row in rows:
        free = row["name"].startswith(("root", "embedding"))
        what = f"{row['name']} on {row['devices']} devices, {row['place']}"
        if row["away"] > 1e-5:
            bad.append(f"{what}: {row['away']:.1e} away from one device")
        if free or row["devices"] == 1:
            continue
        if row["reduces_per_step"] != 1 or row["moves"]:
            bad.append(
                f"{what}: {row['reduces_per_step']} all-reduces, {row['moves']} others"
            )
    return bad


def run(options) -> list[dict]:
    """As one of the suite."""
    groups = GROUPS
    if options.quick:
        groups = [g for g in GROUPS if g.processes == 1 and g.devices in (1, 8)]
    rows = report(groups)
    print(table(rows))
    if bad := failures(rows):
        raise SystemExit("\n".join(bad))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        group, port, index = arguments.worker
        arguments.json.write_text(json.dumps(work(GROUPS[group], index, port)))
        return
    rows = report()
    made = table(rows)
    print(made)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if bad := failures(rows):
        raise SystemExit("\n".join(bad))
    if arguments.write is not None:
        text = arguments.write.read_text()
        before, rest = text.split(_ON)
        after = rest.split(_OFF)[1]
        arguments.write.write_text(f"{before}{_ON}\n\n{made}\n\n{_OFF}{after}")


if __name__ == "__main__":
    main()
