"""Compiled for GPUs and TPUs: no host, one all-reduce a step, few kernels."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent


def load():
    """The benchmark as a module, imported by path."""
    path = ROOT / "benchmarks" / "ahead_of_time.py"
    spec = importlib.util.spec_from_file_location("ahead_of_time", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ahead = load()

# The counting, on programs whose numbers are known: here, without any other hardware.

TEXT = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%fused_add (p.0: f32[4]) -> f32[4] {
  %p.0 = f32[4]{0:T(128)S(1)} parameter(0)
  ROOT %add.1 = f32[4]{0:T(128)} add(%p.0, %p.0), metadata={op_name="jit(f)/rows_of_a_step/add"}
}

%body.row (b.0: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b.0 = (s32[], f32[4]{0}) parameter(0)
  %b.1 = s32[] get-tuple-element(%b.0), index=0
  %b.2 = f32[4]{0} get-tuple-element(%b.0), index=1
  %b.3 = f32[4]{0} ROW(%b.2)
  ROOT %b.4 = (s32[], f32[4]{0}) tuple(%b.1, %b.3)
}

%condition.row (c.0: (s32[], f32[4])) -> pred[] {
  %c.0 = (s32[], f32[4]{0}) parameter(0)
  %c.1 = s32[] get-tuple-element(%c.0), index=0
  %c.2 = s32[]{:T(128)} constant(5)
  ROOT %c.3 = pred[] compare(%c.1, %c.2), direction=LT
}

%body.step (d.0: (s32[], f32[4])) -> (s32[], f32[4]) {
  %d.0 = (s32[], f32[4]{0}) parameter(0)
  %d.1 = (s32[], /*index=1*/f32[4]{0}) while(%d.0), condition=%condition.row, body=%body.row
  %d.2 = f32[4]{0} get-tuple-element(%d.1), index=1
  %d.3 = f32[4]{0:T(128)} fusion(%d.2), kind=kLoop, calls=%fused_add
  %d.6 = f32[4]{0} STEP(%d.3), to_apply=%fused_add
  %d.4 = s32[] get-tuple-element(%d.1), index=0
  ROOT %d.5 = (s32[], f32[4]{0}) tuple(%d.4, %d.3)
}

ENTRY %main.1 (data: f32[4]) -> f32[4] {
  %data = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4]{0}) tuple(%zero, %data)
  %steps = (s32[], f32[4]{0}) while(%start), condition=%condition.row, body=%body.step, backend_config={"known_trip_count":{"n":"7"},"x":"{"}
  %end = f32[4]{0} get-tuple-element(%steps), index=1
  %gone = (f32[4]{0}, f32[4]{0}, u32[]) SEND(%end)
  ROOT %all = f32[4]{0} REDUCE(%end), replica_groups={{0,1}}, to_apply=%fused_add
}
"""  # noqa: E501


def text(**opcodes):
    """TEXT with operations in its four places."""
    free = {"send": "copy", "reduce": "copy", "step": "bitcast", "row": "copy"}
    opcodes = free | opcodes
    return re.sub(
        r"\b(SEND|REDUCE|STEP|ROW)\(",
        lambda place: f"{opcodes[place[1].lower()]}(",
        TEXT,
    )


def test_reads_loops_kernels_and_trip_counts():
    found = ahead.read(text())
    assert found["kernels_per_step"] == 5 + 1  # five turns of a copy, and the fusion
    assert found["kernels_per_step_in_loops"] == 5
    assert found["steps_in_loop"] == 7
    assert found["announced"]
    assert found["questions"] == 0
    assert found["collectives"] == found["host_transfers"] == 0
    longer = ahead.read(text().replace('"known_trip_count":{"n":"7"},', ""))
    assert longer["steps_in_loop"] == 5  # the constant of its condition
    assert not longer["announced"]
    asking = ahead.read(text().replace("direction=LT", "direction=NE"))
    assert asking["questions"] == 1  # the inner loop


def test_finds_collectives_and_transfers():
    for opcode in ("all-reduce", "all-reduce-start", "all-gather", "reduce-scatter"):
        assert ahead.read(text(reduce=opcode))["collectives"] == 1
    assert ahead.read(text(reduce="all-reduce-done"))["collectives"] == 0
    for opcode in ("send", "recv", "infeed", "outfeed"):
        assert ahead.read(text(send=opcode))["host_transfers"] == 1
    to_host = text().replace("f32[4]{0} copy", "f32[4]{0:S(5)} copy")
    assert ahead.read(to_host)["host_transfers"] == 2


@pytest.mark.parametrize(
    ("opcodes", "a_step", "outside", "a_pass"),
    [
        ({}, 0, 0, 0),
        ({"step": "all-reduce"}, 1, 0, 0),
        ({"step": "all-reduce-start"}, 1, 0, 0),
        ({"step": "all-reduce-done"}, 0, 0, 0),
        ({"row": "all-reduce"}, 5, 0, 0),  # the loop within a step turns five times
        ({"step": "all-reduce-start", "row": "all-reduce"}, 6, 0, 0),
        ({"reduce": "all-reduce"}, 0, 1, 1),
        ({"reduce": "all-reduce", "step": "all-reduce-start"}, 1, 1, 1),
        ({"step": "all-gather", "reduce": "reduce-scatter"}, 0, 0, 0),
    ],
)
def test_counts_all_reduces_of_a_step_and_outside(opcodes, a_step, outside, a_pass):
    found = ahead.read(text(**opcodes))
    assert found["reduces_per_step"] == [a_step]
    assert found["reduces_outside"] == outside
    assert found["reduces_of_pass"] == a_pass


def test_counts_all_reduces_wherever_they_are_called():
    module = ahead.parse(text(reduce="all-reduce", row="all-reduce"))
    assert ahead.count_reduces(module, "main.1") == 7 * 5 + 1
    assert ahead.count_reduces(module, "main.1", without=("steps",)) == 1
    asynchronous = text(step="async-start").replace("to_apply", "calls")
    asynchronous = asynchronous.replace("add(%p.0", "all-reduce(%p.0")
    found = ahead.read(asynchronous)["reduces_per_step"]
    assert found == [1 + 1]  # of the fusion, whose computation it shares
    twice = asynchronous.replace("async-start", "async-done")
    assert ahead.read(twice)["reduces_per_step"] == [1]


@pytest.mark.parametrize("place", ["send", "reduce", "step", "row"])
@pytest.mark.parametrize(
    ("opcode", "found"),
    [
        *((one, 1) for one in ("sort", "topk", "all-gather", "all-to-all")),
        *((one, 1) for one in ("collective-permute-start", "reduce-scatter")),
        *((one, 0) for one in ("all-reduce", "all-reduce-start", "all-gather-done")),
    ],
)
def test_finds_sorts_and_moves(place, opcode, found):
    assert ahead.read(text(**{place: opcode}))["sorts_and_moves"] == found


def test_finds_a_sort_by_a_library():
    call = 'custom-call(%end), custom_call_target="__cub$DeviceRadixSort"'
    program = text(send="custom-call").replace("custom-call(%end)", call)
    assert ahead.read(program)["sorts_and_moves"] == 1
    other = program.replace("RadixSort", "Scan")
    assert ahead.read(other)["sorts_and_moves"] == 0


# What is lowered of a call without its rows is what the call itself would compile.
CALL = """
import jax, jaxgd, numpy as np
from benchmarks import ahead_of_time as ahead
from jaxgd._loop import host

class Lowered(Exception):
    pass

def go(*arguments):
    raise Lowered(ahead.go.lower(*arguments))

host.go = go
for case in ahead.cases():
    data = tuple(np.concatenate([x] * 4) for x in case.problem.data)
    data = jaxgd.shard_rows(data)
    try:
        jaxgd.minimize(
            ahead.marked(case, 800), case.problem.init, data, max_steps=1000,
            batch_size=case.batch_size, optimizer=case.factory, learning_rate=0.1,
        )
    except Lowered as found:
        (real,) = found.args
    made = ahead.lowered_call(case, 800, data[0].sharding.mesh)
    assert real.as_text() == made.as_text(), case.name
    # The partitioner makes the all-reduces out of where the rows are.
    assert '[{"rows"}, {}]' in made.as_text(), case.name
    print(case.name)
"""


def test_a_call_is_compiled_as_it_is_made():
    done = in_process("-c", CALL)
    assert len(done.stdout.splitlines()) == 4


def in_process(*command):
    """A process of four devices."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={
            **os.environ,
            **ahead.WITHOUT_A_TPU,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "XLA_FLAGS": "",  # optimized, as users have it
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def steps(keep, call=False):
    """A compiled loop of marked steps: a scan, or a loop of unknown length."""

    def step(x):
        with jax.named_scope(ahead.MARK):
            x = jnp.tanh(x @ x)
            if call:
                jax.debug.callback(lambda x: None, x[0, 0])
        return x

    def run(x, limit):
        if keep:
            return lax.fori_loop(0, limit, lambda i, x: step(x), x)
        return lax.scan(lambda x, _: (step(x), None), x, length=11)[0]

    return jax.jit(run).lower(np.ones((9, 9), "f"), 3).compile().as_text()


def test_tells_a_scan_from_a_loop_of_unknown_length():
    found = ahead.read(steps(keep=False))
    assert found["announced"]
    assert found["steps_in_loop"] == 11
    assert found["kernels_per_step"] >= 1
    found = ahead.read(steps(keep=True))
    assert not found["announced"]
    assert found["steps_in_loop"] is None
    with pytest.raises(ValueError, match="no loop of steps"):
        ahead.read(jax.jit(jnp.sin).lower(1.0).compile().as_text())


def test_finds_a_callback():
    assert ahead.read(steps(keep=False))["host_transfers"] == 0
    assert ahead.read(steps(keep=False, call=True))["host_transfers"] >= 1


# The programs, for hardware that is not here.


@pytest.fixture(scope="module", params=["h100", "tpu"])
def compiled(request, tmp_path_factory):
    """{devices: {case: {program: row}}} of a target, from a process of its own."""
    if lacking := ahead.missing(request.param):
        pytest.skip(f"without {', '.join(lacking)}")
    file = tmp_path_factory.mktemp("ahead") / "found.json"
    command = ("-m", "benchmarks.ahead_of_time", "--target", request.param)
    in_process(*command, "--json", str(file))
    found = {}
    for row in json.loads(file.read_text()):
        of_case = found.setdefault(row["devices"], {}).setdefault(row["name"], {})
        of_case[row["program"]] = row
    assert [*map(len, found.values())] == [4, 4]
    return found


@pytest.fixture(scope="module")
def rows(compiled):
    return compiled[1]


@pytest.fixture(scope="module")
def split(compiled):
    return compiled[4]


def jaxgds(split):
    """(name, its programs, row) for each program of jaxgd on several devices."""
    found = [
        (f"{name}, {program}", programs, row)
        for name, programs in split.items()
        for program, row in programs.items()
        if program in ("jaxgd", "in jit", "explicit")
    ]
    assert len(found) == 4 + 4 + 1
    return found


def test_no_program_asks_the_host_or_sorts(compiled):
    for cases in compiled.values():
        for name, programs in cases.items():
            for row in programs.values():
                assert row["host_transfers"] == 0, name
                assert row["known_trip_count"], name
                assert row["questions"] == 0, name
                assert row["sorts_and_moves"] == 0, name


def test_one_device_asks_no_other(rows):
    for programs in rows.values():
        for row in programs.values():
            assert row["collectives"] == 0


def test_split_rows_take_one_all_reduce_a_step(split):
    for name, _, row in jaxgds(split):
        assert row["reduces_per_step"] == [1, 1], name  # of full chunks, and the rest
        assert row["reduces_outside"] <= 1, name
        if row["program"] == "jaxgd":  # one for each block, of which there are 100
            assert row["reduces_of_pass"] <= 100, name
        assert row["collectives"] == 2 + row["reduces_outside"], name


def test_a_step_is_the_hand_written_one(rows):
    for name, programs in rows.items():
        gpu = programs["jaxgd"]["target"] == "h100"
        kernels = {k: row["kernels_per_step"] for k, row in programs.items()}
        if "steps alone" in programs:
            # A TPU lays out each leaf anew for each of the three sums of the norm.
            more, of_bare = (5, 0) if gpu else (25, 14)
            assert kernels["jaxgd"] <= kernels["steps alone"] + more, name
            assert kernels["jaxgd"] <= kernels["bare scan"] + of_bare, name
        else:  # what the stop rule wants of every step: norms, and whether it moved
            assert kernels["jaxgd"] <= kernels["bare scan"] + 8, name


def test_a_step_on_split_rows_is_the_hand_written_one(split):
    for name, programs, row in jaxgds(split):
        alone = programs.get("steps alone", programs.get("bare scan"))
        more = 8 if row["batch_size"] is None else 5 if row["target"] == "h100" else 25
        assert row["kernels_per_step"] <= alone["kernels_per_step"] + more, name


def test_temporaries_of_a_device_do_not_grow_with_the_rows(rows, split):
    for name, _, row in jaxgds(split):
        growth, alone = (
            one["temp_bytes_8n"] - one["temp_bytes"]
            for one in (row, rows[row["name"]]["jaxgd"])
        )
        # A TPU copies what it does for one device with as many rows.
        allowed = max(0, alone) if row["target"] == "tpu" else 0
        assert growth <= allowed + 0.1 * row["temp_bytes"], name


def test_temporaries_do_not_grow_with_the_rows(rows):
    for name, programs in rows.items():
        row, bare = programs["jaxgd"], programs["bare scan"]
        growth = {
            k: one["temp_bytes_8n"] - one["temp_bytes"] for k, one in programs.items()
        }
        allowed = max(0, growth["bare scan"])  # where XLA copies data for any loop
        if row["batch_size"] is None and row["target"] == "tpu":
            # One copy in rows of 128 numbers, and blocks of the values of rows.
            allowed += 7 * row["rows"] * 4 * (128 + 3)
        assert growth["jaxgd"] <= allowed + 0.1 * row["temp_bytes"], name
        if row["target"] == "h100":  # blocks of rows, and those of the full pass
            assert row["temp_bytes"] <= bare["temp_bytes"] + 2**24, name
