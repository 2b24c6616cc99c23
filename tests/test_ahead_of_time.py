"""Compiled for a GPU and a TPU: no host, no collectives, few kernels, no copies."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

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
  %b.3 = f32[4]{0} copy(%b.2)
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


def text(send="copy", reduce="copy"):
    return TEXT.replace("SEND", send).replace("REDUCE", reduce)


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
def rows(request, tmp_path_factory):
    """{case: {program: row}} of a target, compiled in a process of its own."""
    if lacking := ahead.missing(request.param):
        pytest.skip(f"without {', '.join(lacking)}")
    file = tmp_path_factory.mktemp("ahead") / "found.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.ahead_of_time"),
            *("--target", request.param, "--json", str(file)),
        ],
        cwd=ROOT,
        env={**os.environ, **ahead.WITHOUT_A_TPU, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for row in json.loads(file.read_text()):
        found.setdefault(row["name"], {})[row["program"]] = row
    assert len(found) == 4
    return found


def test_no_program_asks_the_host_or_another_device(rows):
    for programs in rows.values():
        for row in programs.values():
            assert row["host_transfers"] == 0
            assert row["collectives"] == 0
            assert row["known_trip_count"]
            assert row["questions"] == 0


def test_a_step_is_the_hand_written_one(rows):
    for name, programs in rows.items():
        gpu = programs["jaxgd"]["target"] == "h100"
        kernels = {k: row["kernels_per_step"] for k, row in programs.items()}
        if "steps alone" in programs:
            more = 5 if gpu else 14  # a TPU lays out each leaf anew for the norm
            assert kernels["jaxgd"] <= kernels["steps alone"] + more, name
            assert kernels["jaxgd"] <= kernels["bare scan"] + (0 if gpu else 3), name
        else:  # what the stop rule wants of every step: norms, and whether it moved
            assert kernels["jaxgd"] <= kernels["bare scan"] + 8, name


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
