"""Claim: on GPUs and TPUs a step is the hand-written one, and asks no host.

Compiles programs for hardware that need not be there, one NVIDIA H100 and one TPU v5e,
then 4 H100 and a v5e 2x2 with the rows split over the four, and reads the optimized
HLO: ``jaxgd.minimize``, history and checks included, against a bare hand-written
``lax.scan`` of the same steps on the same rows, and against the steps alone, a scan
over batches that are given.

- Kernels a step. Aim on the GPU: no more than the bare scan, which computes its rows in
  every step, and at most 5 more than the steps alone (norms, a write for each column of
  history); batch descent, judged at every iterate, at most 8 more. On the TPU, where
  the norm lays out each leaf anew: at most 3 more than the bare scan, 14 more than the
  steps alone.
- Transfers to the host, callbacks (aim: none), and questions to the host within a chunk
  (aim: none; XLA:GPU asks at each ``conditional``, and at each turn of a loop whose
  trip count it does not know).
- All-reduces a step (aim: none on one device; on four exactly one, of gradient and
  value together) and outside of the steps (aim: at most one in the program, that of the
  full pass, which runs once for each block of rows). Sorts, and collectives that are no
  all-reduce (aim: none).
- Temporaries in bytes of a device, on n and 8 n rows (aim: they do not grow where the
  bare scan's do not; known exception: for batch descent a TPU holds a copy of the data,
  as for any loop within a loop whose rows it would rather have in another layout).

On four devices XLA's partitioner divides the work. A call (``jaxgd``) sees where its
rows are; in a user's jit it is told by ``strata=4`` that each device has rows of its
own (``in jit``), or by a mesh with explicit axes (``explicit``).

    python -m benchmarks.ahead_of_time [--target tpu|h100|all] [--json FILE]

It needs ``libtpu`` (0.0.42.1 goes with jax 0.10.2) for the TPU and
``jax-cuda12-plugin`` for the GPU; a target without its package is skipped. Nothing is
run or timed, and without a GPU nothing is tuned: this tells what a program contains,
not how fast it is.
"""

import os

if __name__ == "__main__":
    # Read when jax is imported; plugins whose hardware is not there refuse to load
    # where they might have to run something.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxgd
from jaxgd import problems
from jaxgd._call.arguments import checked
from jaxgd._call.call import Call
from jaxgd._call.fit import weighed
from jaxgd._loop.program import go, start

PACKAGES = {
    "h100": ("jax_cuda12_plugin", "jax_plugins.xla_cuda12"),
    "tpu": ("libtpu",),
}
NAMES = {
    ("h100", 1): "one H100",
    ("h100", 4): "4 H100",
    ("tpu", 1): "one v5e",
    ("tpu", 4): "v5e 2x2",
}

# What the compiler wants to know of the GPU: NVIDIA's public figures for the H100 SXM
# (data sheet; CUDA programming guide, compute capability 9.0), in the fields of XLA's
# GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  device_memory_size: 85899345920
}
platform_name: "CUDA"
"""

# libtpu would look for its machine, and for other processes that hold the TPU.
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# So many that no copy of the data fits into the fast memory of the TPU (128 MB), which
# temporaries do not count. Only shapes are made.
_ROWS = 400_000  # of each device
_STEPS = 1000  # of the scans written by hand
_GIVEN = "steps alone"
_IN_EXPLICIT = "logistic 20, batch 32, SGD"  # programs differ little from "in jit"
MARK = "rows_of_a_step"  # scope of the objective in a step, and in no full pass


def missing(target: str) -> list[str]:
    """Modules that this target needs and that are not installed."""

    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the package that the module would be in
            return False

    return [name for name in PACKAGES[target] if not found(name)]


def devices(target: str, count: int) -> list:
    """Devices of the target, to compile for; jax itself runs on the CPU."""
    if target == "tpu":
        for name, value in WITHOUT_A_TPU.items():
            os.environ.setdefault(name, value)
        side = math.isqrt(count)
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"v5e:{side}x{side}",
            chips_per_host_bounds=[side, side, 1],
        )
    else:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            target_config=_H100,
            topology=f"1x1x{count}",
        )
    return list(found.devices)


# The programs.


class Case(NamedTuple):
    name: str
    problem: problems.Problem  # of few rows: programs get shapes alone
    batch_size: int | None
    factory: Any


def cases() -> Iterator[Case]:
    logistic = problems.logistic(*problems.blobs(200, 20, 2))
    mlp = problems.mlp(*problems.blobs(200, 64, 10), sizes=(64, 32, 10))
    squares = problems.least_squares(*problems.linear_data(200, 100))
    yield Case("logistic 20, batch 32, SGD", logistic, 32, None)
    yield Case("MLP 64-32-10, batch 32, SGD", mlp, 32, None)
    yield Case("MLP 64-32-10, batch 32, Adam", mlp, 32, optax.adam)
    yield Case("least squares 100, full batch", squares, None, None)


def marked(case: Case, n: int) -> Callable:
    """The objective, with its operations named where it sees the rows of a step."""
    rows = case.batch_size or n

    def objective(params, batch):
        scope = MARK if len(batch[0]) == rows else "rows_of_a_pass"
        with jax.named_scope(scope):
            return case.problem.fun(params, batch)

    return objective


def minimization(case: Case, n: int, strata: int | None = None) -> Callable:
    fun = marked(case, n)

    def run(params, data, key, rate, steps):
        return jaxgd.minimize(
            fun,
            params,
            data,
            batch_size=case.batch_size,
            optimizer=case.factory,
            learning_rate=rate,
            max_steps=steps,
            key=key,
            strata=strata,
        )

    return run


def bare_scan(case: Case, n: int, given: bool = False) -> Callable:
    """Nothing but steps; ``given``: a scan over batches instead of their rows."""
    fun, factory = marked(case, n), case.factory or optax.sgd

    def run(params, data, key, rate, steps):
        rule = factory(rate)

        def step(carry, x):
            params, opt_state = carry
            batch = data
            if given:
                batch = x
            elif case.batch_size is not None:
                rows = jaxgd.batch_rows(key, n, case.batch_size, x)
                batch = jax.tree.map(lambda leaf: leaf[rows], data)
            value, grad = jax.value_and_grad(fun)(params, batch)
            updates, opt_state = rule.update(grad, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        xs = data if given else jnp.arange(_STEPS)
        return lax.scan(step, (params, rule.init(params)), xs)

    return run


def compiled(run: Callable, case: Case, leading: tuple, rows, rest) -> Any:
    """``run`` compiled; ``leading``: axes of data in place of its rows.

    ``rows``, ``rest``: shardings of the data and of all else.
    """

    def like(x):
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=rest)

    arguments = (
        jax.tree.map(like, case.problem.init),
        shapes(case.problem.data, leading, rows),
        *map(like, (jax.random.key(0), np.float32(0.1), np.int32(_STEPS))),
    )
    return jax.jit(run).lower(*arguments).compile()


def shapes(data, leading: tuple, sharding) -> Any:
    """``data`` without numbers, its axis of rows replaced."""

    def like(x):
        shape = (*leading, *np.shape(x)[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    return jax.tree.map(like, data)


def lowered_call(case: Case, n: int, mesh: Mesh) -> Any:
    """A call in no jit on ``n`` rows split over ``mesh``, before it is compiled.

    A call tries its objective on some of the rows, which needs numbers: few of them,
    on devices that are here. Then rows and devices are replaced by those to compile
    for, as the call would have found them.
    """
    near = jax.devices()[: mesh.size]
    call = Call(
        marked(case, n),
        case.problem.init,
        jaxgd.shard_rows(case.problem.data, near),
        batch_size=case.batch_size,
        optimizer=case.factory,
        learning_rate=0.1,
        max_steps=_STEPS,
    )
    spec, numbers, limit = checked(call)
    numbers = numbers._replace(
        data=shapes(case.problem.data, (n,), NamedSharding(mesh, P(*mesh.axis_names)))
    )
    there = spec._replace(
        n=n,
        layout=spec.layout._replace(mesh=mesh),
        places=spec.places._replace(
            mesh=mesh,
            own=tuple(NamedSharding(mesh, own.spec) for own in spec.places.own),
        ),
    )
    there = weighed(there, numbers)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P())
        ),
        start.eval_shape(there, numbers),
    )
    return go.lower(there, numbers, state, limit)


# Reading optimized HLO.


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    calls: tuple[str, ...]  # computations, in no particular order


Module = dict[str, list[Instruction]]  # its computations by name

_HEAD = re.compile(r"(?:ENTRY )?%?([\w.-]+) .*\{$")
_NAME = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" ([\w-]+)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.-]+)"
)
_CALLED_SEVERAL = re.compile(
    r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
)

_SCALAR = re.compile(r"\w+\[(1(,1)*)?\](\{[^}]*\})?")
# Nothing is launched for these.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
_ALL_REDUCE = ("all-reduce",)
_TO_HOST = ("infeed", "outfeed", "send", "recv")
_HOST_CALL = re.compile(r'custom_call_target="[^"]*(?:callback|host)', re.IGNORECASE)
_SORT_CALL = re.compile(r'custom_call_target="[^"]*(?:sort|topk)', re.IGNORECASE)
_HOST_MEMORY = re.compile(r"\{[^{}]*S\(5\)[^{}]*\}")


def parse(text: str) -> Module:
    """The computations of a module from its text."""
    module: Module = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            body = module.setdefault(head[1], [])
        elif name := _NAME.match(line):
            end = _end_of_shape(line, name.end())
            opcode = _OPCODE.match(line, end)
            if opcode is None:
                raise ValueError(f"no operation in this line of HLO: {line}")
            rest = line[opcode.end() :]
            calls = _CALLED.findall(rest)
            for several in _CALLED_SEVERAL.findall(rest):
                calls += [name.strip(" %") for name in several.split(",")]
            body.append(
                Instruction(
                    name[1], line[name.end() : end], opcode[1], rest, tuple(calls)
                )
            )
    return module


def _end_of_shape(line: str, start: int) -> int:
    depth = 0
    for i in range(start, len(line)):
        if line[i] == " " and depth == 0:
            return i
        depth += (line[i] in "({[") - (line[i] in ")}]")
    return len(line)


def count_collectives(module: Module) -> int:
    return sum(_starts(one.opcode, _COLLECTIVES) for one in _all(module))


def count_reduces(module: Module, name: str, without: tuple = ()) -> int:
    """All-reduces in one run of a computation, in all that it calls.

    A loop counts as often as it turns, once where nobody knows; a branch counts as the
    one with most.
    """
    found = 0
    for one in module[name]:
        if one.name in without or one.opcode.endswith(("-done", "-update")):
            continue
        counts = [count_reduces(module, called, without) for called in one.calls]
        if one.opcode == "while":
            found += sum(counts) * (turns(module, one) or 1)
        elif one.opcode == "conditional":
            found += max(counts)
        else:
            found += sum(counts) + _starts(one.opcode, _ALL_REDUCE)
    return found


def count_sorts_and_moves(module: Module) -> int:
    """Sorts, and collectives that bring rows or leaves to other devices."""
    return sum(
        _starts(one.opcode, (*_COLLECTIVES, "sort", "topk"))
        or bool(one.opcode.startswith("custom-call") and _SORT_CALL.search(one.rest))
        for one in _all(module)
        if not _starts(one.opcode, _ALL_REDUCE)
    )


def count_host_transfers(module: Module) -> int:
    """Feeds, sends, callbacks, and results that lie in the memory of the host."""
    return sum(
        _starts(one.opcode, _TO_HOST)
        or bool(one.opcode.startswith("custom-call") and _HOST_CALL.search(one.rest))
        or (one.opcode not in _FREE and bool(_HOST_MEMORY.search(one.shape)))
        for one in _all(module)
    )


def _all(module: Module) -> Iterator[Instruction]:
    for body in module.values():
        yield from body


def _entry(module: Module) -> str:
    (entry,) = module.keys() - {name for one in _all(module) for name in one.calls}
    return entry


def _reached(module: Module, names: Iterable[str]) -> set[str]:
    """Computations that run where these do, they themselves included."""
    reached, following = set(), set(names)
    while following:
        reached |= following
        called = {c for name in following for one in module[name] for c in one.calls}
        following = called - reached
    return reached


def _starts(opcode: str, kinds: tuple) -> bool:
    return opcode.removesuffix("-start") in kinds


def _bodies(one: Instruction) -> tuple[str, ...]:
    """What an instruction runs; a sum of two numbers may be shared by all reductions,
    and says nothing of any."""
    reduces = one.opcode != "call" and "to_apply=" in one.rest
    return () if reduces else one.calls


def _called(one: Instruction, attribute: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.-]+)", one.rest)
    if found is None:
        raise ValueError(f"{one.opcode} {one.name} has no {attribute}")
    return found[1]


def announced(loop: Instruction) -> int | None:
    """The trip count that XLA wrote to the loop: with it, no GPU asks the host."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(found[1]) if found else None


def turns(module: Module, loop: Instruction) -> int | None:
    """The trip count, announced or the constant that the counter is held against."""
    if announced(loop) is not None:
        return announced(loop)
    condition = module[_called(loop, "condition")]
    constants = {
        one.name: int(one.rest.split(")")[0])
        for one in condition
        if one.opcode == "constant" and re.match(r"-?\d+\)", one.rest)
    }
    last = condition[-1]
    if last.opcode == "compare" and "direction=LT" in last.rest:
        right = last.rest.split(")")[0].split(",")[-1].strip(" %")
        return constants.get(right)
    return None


def count_kernels(module: Module, name: str, without: tuple = ()) -> tuple[int, int]:
    """(launches of one run of a computation, those of them within loops).

    A fusion, a library call or a copy is one launch. A loop counts as often as it
    turns, once where nobody knows; a branch counts as its longest.
    """
    outside = inside = 0
    for one in module[name]:
        if one.opcode == "while":
            if one.name in without:
                continue
            times = turns(module, one) or 1
            inside += times * sum(count_kernels(module, _called(one, "body")))
            if announced(one) is None:
                inside += times * sum(count_kernels(module, _called(one, "condition")))
        elif one.opcode == "conditional":
            outside += max(sum(count_kernels(module, c)) for c in one.calls)
        elif one.opcode == "call":
            once = count_kernels(module, _called(one, "to_apply"), without)
            outside, inside = outside + once[0], inside + once[1]
        elif not _is_free(one):
            outside += 1
    return outside, inside


def _is_free(one: Instruction) -> bool:
    if one.opcode in ("fusion", "copy", "custom-call"):
        return '"AllocateBuffer"' in one.rest
    done = one.opcode.endswith(("-done", "-update"))  # of what has been started
    # A TPU has its own unit for single numbers; a GPU gets them fused.
    return one.opcode in _FREE or done or bool(_SCALAR.fullmatch(one.shape))


def count_questions(module: Module, name: str) -> int:
    """Branches and loops of unknown length in a computation: a GPU asks the host."""
    asked = 0
    for one in module[name]:
        asked += one.opcode == "conditional"
        asked += one.opcode == "while" and turns(module, one) is None
        if one.opcode in ("while", "conditional", "call"):
            asked += sum(count_questions(module, called) for called in one.calls)
    return asked


def loops_of_steps(module: Module) -> list[tuple[str, Instruction]]:
    """(computation, loop): the innermost loops that hold the marked objective."""

    def holds(name: str) -> bool:
        return any(
            MARK in one.rest
            or (one.opcode != "while" and any(holds(c) for c in _bodies(one)))
            for one in module[name]
        )

    def holds_loop(name: str) -> bool:
        return any(
            holds_loop(c) or (one.opcode == "while" and holds(c))
            for one in module[name]
            for c in one.calls
        )

    return [
        (name, one)
        for name, body in module.items()
        for one in body
        if one.opcode == "while"
        and holds(_called(one, "body"))
        and not holds_loop(_called(one, "body"))
    ]


def read(text: str) -> dict:
    """What the optimized HLO of a program tells of its steps."""
    module = parse(text)
    loops = loops_of_steps(module)
    if not loops:
        raise ValueError("no loop of steps in this program")
    # First the one of known length: full chunks. Another takes what is left of them.
    loops.sort(key=lambda found: turns(module, found[1]) is None)
    (around, loop), *others = loops
    bodies = [_called(one, "body") for _, one in loops]
    in_loops = count_kernels(module, bodies[0])[1]
    steps = tuple(one.name for _, one in loops)
    in_chunks = any(
        one.opcode == "while" and _called(one, "body") == around for one in _all(module)
    )
    return {
        "kernels_per_step": sum(count_kernels(module, bodies[0])),
        "kernels_per_step_in_loops": in_loops,
        "kernels_per_step_of_tail": sum(count_kernels(module, bodies[1]))
        if others
        else None,
        "kernels_per_chunk": sum(count_kernels(module, around, steps))
        if in_chunks
        else None,
        "steps_in_loop": turns(module, loop),
        "announced": announced(loop) is not None,
        "questions": count_questions(module, around if in_chunks else bodies[0]),
        "reduces_per_step": [count_reduces(module, body) for body in bodies],
        "reduces_outside": sum(
            _starts(one.opcode, _ALL_REDUCE)
            for name in module.keys() - _reached(module, bodies)
            for one in module[name]
        ),
        "reduces_of_pass": count_reduces(module, _entry(module), steps),
        "sorts_and_moves": count_sorts_and_moves(module),
        "collectives": count_collectives(module),
        "host_transfers": count_host_transfers(module),
    }


# The report.


def report(target: str) -> list[dict]:
    """One row for each case and program: numbers of kernels, loops and bytes."""
    to = devices(target, 1)[0]
    found = [
        row for case in cases() for row in rows_of(case, target, 1, alone(case, to))
    ]
    four = np.asarray(devices(target, 4))
    for case in cases():
        found += rows_of(case, target, 4, split(case, four))
    return found


def alone(case: Case, device) -> dict[str, Callable]:
    """{name: rows -> program} on one device."""
    here = SingleDeviceSharding(device)

    def made(program, n):
        return compiled(program(case, n), case, (n,), here, here)

    programs = {
        "jaxgd": partial(made, minimization),
        "bare scan": partial(made, bare_scan),
    }
    if case.batch_size is not None:
        programs[_GIVEN] = partial(on_given, case, here, here)
    return programs


def split(case: Case, devices: np.ndarray) -> dict[str, Callable]:
    """{name: rows -> program} on several, the rows split over them."""
    auto = Mesh(devices, ("rows",), axis_types=(AxisType.Auto,))
    explicit = Mesh(devices, ("rows",), axis_types=(AxisType.Explicit,))
    strata = None if case.batch_size is None else len(devices)

    def in_jit(program, mesh, n):
        rows, rest = (NamedSharding(mesh, spec) for spec in (P("rows"), P()))
        return compiled(program(case, n), case, (n,), rows, rest)

    programs = {
        "jaxgd": lambda n: lowered_call(case, n, auto).compile(),
        "in jit": partial(in_jit, partial(minimization, strata=strata), auto),
    }
    if case.name == _IN_EXPLICIT:
        programs["explicit"] = partial(in_jit, minimization, explicit)
    if case.batch_size is None:
        return programs | {"bare scan": partial(in_jit, bare_scan, auto)}
    rows, rest = (NamedSharding(auto, spec) for spec in (P(None, "rows"), P()))
    return programs | {_GIVEN: partial(on_given, case, rows, rest)}


def on_given(case: Case, rows, rest, n: int) -> Any:
    """The steps alone, whose data is the same for all numbers of rows."""
    leading = (_STEPS, case.batch_size)
    return compiled(bare_scan(case, n, given=True), case, leading, rows, rest)


def rows_of(case: Case, target: str, count: int, programs: dict) -> Iterator[dict]:
    n = count * _ROWS
    for name, made in programs.items():
        began = time.perf_counter()
        small = made(n)
        seconds = time.perf_counter() - began
        found = read(small.as_text())
        yield {
            "name": case.name,
            "target": target,
            "devices": count,
            "program": name,
            "batch_size": case.batch_size,
            "rows": n,
            # A TPU runs its loops by itself: there it is enough that we know.
            "known_trip_count": found["announced"]
            or (target == "tpu" and found["steps_in_loop"] is not None),
            **found,
            "temp_bytes": temporaries(small),
            "temp_bytes_8n": temporaries(small if name == _GIVEN else made(8 * n)),
            "seconds": round(seconds, 2),
        }


def temporaries(program) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


_COLUMNS = {
    "kernels_per_step": "kernels",
    "kernels_per_step_in_loops": "in loops",
    "kernels_per_step_of_tail": "tail",
    "steps_in_loop": "chunk",
    "kernels_per_chunk": "a chunk",
    "known_trip_count": "known",
    "questions": "asks",
    "host_transfers": "host",
    "reduces_per_step": "reduces",
    "reduces_outside": "outside",
    "reduces_of_pass": "a pass",
    "sorts_and_moves": "moves",
    "temp_bytes": "temp n",
    "temp_bytes_8n": "temp 8n",
    "seconds": "s",
}


def show(rows: list[dict]) -> None:
    width = "{:13}" + "{:>9}" * 12 + "{:>12}" * 2 + "{:>6}"
    print(width.format("program", *_COLUMNS.values()))
    name = None
    for row in rows:
        if row["name"] != name:
            name = row["name"]
            print(name)
        row = row | {"reduces_per_step": max(row["reduces_per_step"])}
        numbers = ["-" if row[key] is None else str(row[key]) for key in _COLUMNS]
        print(width.format("  " + row["program"], *numbers))


def run(options) -> list[dict]:
    """As one of the suite, in a process of its own: plugins are chosen at import."""
    if options.quick:
        print("  left out by --quick: compiling for two targets takes minutes")
        return []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.ahead_of_time",
            "--json",
            str(file),
        ]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=[*PACKAGES, "all"], default="all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = []
    for target in PACKAGES if arguments.target == "all" else [arguments.target]:
        if lacking := missing(target):
            print(f"{target}: skipped, without {', '.join(lacking)}\n")
            continue
        rows = report(target)
        for count in (1, 4):
            print(
                f"{NAMES[target, count]}, jax {jax.__version__}, {count * _ROWS} rows"
            )
            show([row for row in rows if row["devices"] == count])
            print()
        found += rows
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
