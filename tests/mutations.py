"""Sixty faults, put in one by one: does a test fail?

    python -m tests.mutations [--full] [part of a name ...]

copies the project, changes one line of it and runs the tests that should see that, in
the quick tier (``--full``: in both), until one fails. It writes ``tests/mutations.md``
and takes about half a minute a fault. Run it before tests are deleted, and after.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_ENDLESS = 600  # seconds of the quick tier; of both, four times as many
TABLE = Path(__file__).parent / "mutations.md"


class Mutation(NamedTuple):
    room: str  # of jaxgd
    what: str
    old: str  # to be found once
    new: str
    tests: str  # files that should see it, the likeliest first


LOOP = "honest chunks iterate stop exact"
ROWS = "rows exact stream"
STOP = "stop verdicts honest"
MUTATIONS = (
    Mutation(
        "_loop/advance",
        "a run that is not finite at the start goes on",
        "goal=jnp.where(finite, limit, state.step),",
        "goal=limit,",
        LOOP,
    ),
    Mutation(
        "_loop/advance",
        "the goal is one step too late",
        "goal = jnp.where(held, step + held_at, now.goal)",
        "goal = jnp.where(held, step + held_at + 1, now.goal)",
        LOOP,
    ),
    Mutation(
        "_loop/advance",
        "a bad step comes back itself",
        "goal = jnp.where(lost, step + bad_at - 1, goal)",
        "goal = jnp.where(lost, step + bad_at, goal)",
        LOOP,
    ),
    Mutation(
        "_loop/advance",
        "the step before a bad one is called bad",
        "verdict = jnp.where(lost, not_finite(step + bad_at), verdict)",
        "verdict = jnp.where(lost, not_finite(step + bad_at - 1), verdict)",
        LOOP,
    ),
    Mutation(
        "_loop/advance",
        "a chunk may be one step too long",
        "    count = jnp.minimum(now.most, now.goal - step)",
        "    count = jnp.minimum(now.most, now.goal - step + 1)",
        "transforms " + LOOP,
    ),
    Mutation(
        "_loop/passes",
        "a pass is not counted",
        "evaluations=run.evaluations + 1,",
        "evaluations=run.evaluations,",
        LOOP,
    ),
    Mutation(
        "_loop/passes",
        "the pass at the end is counted twice",
        "extra = jnp.where(checked, 0, jnp.int32(parts.final_evaluation))",
        "extra = jnp.int32(parts.final_evaluation)",
        LOOP,
    ),
    Mutation(
        "_loop/passes",
        "the limit comes a step late",
        "at_limit = (verdict == Status.RUNNING) & (state.step >= limit)",
        "at_limit = (verdict == Status.RUNNING) & (state.step > limit)",
        LOOP,
    ),
    Mutation(
        "_loop/memory",
        "a start that is not finite has diverged",
        "code = jnp.where(step == 0, Status.NON_FINITE, Status.DIVERGED)",
        "code = jnp.where(step < 0, Status.NON_FINITE, Status.DIVERGED)",
        LOOP,
    ),
    Mutation(
        "_loop/memory",
        "the last place at which it happened",
        "return jnp.min(jnp.where(happened, places, happened.shape[0]))",
        "return jnp.max(jnp.where(happened, places, happened.shape[0]))",
        LOOP,
    ),
    Mutation(
        "_loop/chunk",
        "the norm of the step after",
        "return jnp.concatenate([jnp.reshape(before, (1,)), values[:-1]])",
        "return values",
        "stop chunks iterate verdicts",
    ),
    Mutation(
        "_loop/memory",
        "steps that were absorbed are not counted",
        "skipped = skipped + jnp.sum(live & infos.absorbed, dtype=jnp.int32)",
        "skipped = skipped",
        "not_finite optax_wrappers",
    ),
    Mutation(
        "_loop/memory",
        "a value alone decides what is finite",
        "return jnp.isfinite(seen.value) & jnp.isfinite(seen.grad_norm)",
        "return jnp.isfinite(seen.value)",
        "not_finite honest",
    ),
    Mutation(
        "_loop/memory",
        "a change of parameters before any check",
        "return jnp.where(run.watch.started, change, jnp.nan)",
        "return change",
        "stop honest",
    ),
    Mutation(
        "_loop/memory",
        "evaluations beyond the last step",
        "taken = jnp.sum(jnp.where(live, infos.evaluations, 0), dtype=jnp.int32)",
        "taken = jnp.sum(infos.evaluations, dtype=jnp.int32)",
        "sweep scaled_lbfgs spectral chunks",
    ),
    Mutation(
        "_rows/order",
        "a place too far in an epoch",
        "over = (place >= m).astype(jnp.uint32)",
        "over = (place > m).astype(jnp.uint32)",
        ROWS,
    ),
    Mutation(
        "_rows/order",
        "a shuffle that never leaves a row where it is",
        "draw = _below(_mix(_mix(low + k * high) ^ high), k + 1)",
        "draw = _below(_mix(_mix(low + k * high) ^ high), k)",
        ROWS,
    ),
    Mutation(
        "_rows/order",
        "a shuffle that forgets half of the key",
        "draw = _below(_mix(_mix(low + k * high) ^ high), k + 1)",
        "draw = _below(_mix(_mix(low + k)), k + 1)",
        ROWS,
    ),
    Mutation(
        "_rows/order",
        "a permutation that meets rows twice",
        "column = column - jnp.where(column >= length, length, jnp.uint32(0))",
        "column = column - jnp.where(column > length, length, jnp.uint32(0))",
        ROWS,
    ),
    Mutation(
        "_rows/order",
        "an epoch ends where it begins",
        "due = (ended >= 1) & (last == steps) & (checked < step)",
        "due = (ended >= 0) & (last == steps) & (checked < step)",
        "honest stop rows",
    ),
    Mutation(
        "_rows/order",
        "a place taken up anew",
        "place=jnp.where(other, jnp.uint32(0), old.place),",
        "place=old.place,",
        "place rows checkpoint iterate stream",
    ),
    Mutation(
        "_rows/resident",
        "the key of a pass in every step",
        "return jnp.where(closing, pass_key(key), own)",
        "return pass_key(key)",
        "objective iterate exact",
    ),
    Mutation(
        "_stop/rules",
        "a gradient norm that is relative alone",
        "return first, check.grad_norm <= atol + rtol * first",
        "return first, check.grad_norm <= rtol * first",
        STOP,
    ),
    Mutation(
        "_stop/rules",
        "a change without its absolute part",
        "change <= atol + rtol * jnp.abs(check.value), in_a_row + 1, 0)",
        "change <= rtol * jnp.abs(check.value), in_a_row + 1, 0)",
        STOP,
    ),
    Mutation(
        "_stop/rules",
        "patience is one too long",
        "return (check.value, change, in_a_row), in_a_row >= patience",
        "return (check.value, change, in_a_row), in_a_row > patience",
        STOP,
    ),
    Mutation(
        "_stop/rules",
        "calm checks need not be in a row",
        "in_a_row = jnp.where(check.update_norm <= threshold, in_a_row + 1, 0)",
        "in_a_row = jnp.where(check.update_norm <= threshold, in_a_row + 1, in_a_row)",
        STOP,
    ),
    Mutation(
        "_stop/rules",
        "a target is to be undercut",
        "return memory, check.value <= target",
        "return memory, check.value < target",
        STOP,
    ),
    Mutation(
        "_stop/rules",
        "rounding is no bound",
        "holds = (left <= rounding) | (vanishes & (left <= part))",
        "holds = vanishes & (left <= part)",
        "verdicts stop result scaled_lbfgs",
    ),
    Mutation(
        "_stop/rules",
        "a vanishing objective has no bound",
        "holds = (left <= rounding) | (vanishes & (left <= part))",
        "holds = left <= rounding",
        "verdicts stop result problems scaled_lbfgs",
    ),
    Mutation(
        "_stop/judge",
        "one estimate is enough",
        "worst = jnp.where(told >= _ESTIMATES, jnp.max(estimates), jnp.inf)",
        "worst = jnp.where(told >= 1, jnp.min(estimates), jnp.inf)",
        "stop verdicts",
    ),
    Mutation(
        "_stop/judge",
        "what the objective fell by refutes nothing",
        "told = jnp.where(room > jnp.max(so_far), 0, fall.told)",
        "told = fall.told",
        "stop verdicts",
    ),
    Mutation(
        "_stop/judge",
        "no verdict waits",
        "            holds = holds & sure",
        "            holds = holds",
        "verdicts stop",
    ),
    Mutation(
        "_stop/judge",
        "a level gradient tells nothing",
        "return level, jnp.where((level >= _LEVEL_CHECKS) & tells, flat, 0)",
        "flat = jnp.zeros_like(flat)",
        "verdicts stop",
    ),
    Mutation(
        "_stop/judge",
        "a run that stands still never ends",
        "otherwise = jnp.where(still >= STILL_STEPS, end, Status.RUNNING)",
        "otherwise = jnp.int32(Status.RUNNING)",
        "stop verdicts",
    ),
    Mutation(
        "_stop/judge",
        "small steps are no stall",
        "failed, jnp.where(resting, Status.AT_REST, Status.STALLED), code",
        "failed, code, code",
        "stop verdicts",
    ),
    Mutation(
        "_stop/judge",
        "nothing is at rest",
        "end = jnp.where(at_rest, Status.AT_REST, Status.STALLED)",
        "end = jnp.int32(Status.STALLED)",
        "verdicts stop",
    ),
    Mutation(
        "_loop/outcome",
        "a rule at rest is not asked",
        "return jnp.where(rests & asleep, Status.STALLED, end.status)",
        "return end.status",
        "verdicts",
    ),
    Mutation(
        "_problem/objective",
        "blocks are weighted alike",
        "total = add_block(total, means, rest / n)",
        "total = add_block(total, means, block / n)",
        "objective trial stream",
    ),
    Mutation(
        "_problem/objective",
        "the gradient of complex leaves is conjugate",
        "g.conj() if jnp.iscomplexobj(g) else g",
        "g",
        "complex",
    ),
    Mutation(
        "_problem/objective",
        "the rest of the rows is left out",
        "    if rest:\n        means, last",
        "    if rest < 0:\n        means, last",
        "objective trial stream",
    ),
    Mutation(
        "_problem/objective",
        "counts in blocks are averaged",
        "x = jnp.sum(x, axis=0, dtype=shape.dtype)",
        "x = jnp.max(x, axis=0)",
        "objective",
    ),
    Mutation(
        "_problem/objective",
        "all becomes any",
        "x = jnp.all(x, axis=0)",
        "x = jnp.any(x, axis=0)",
        "objective",
    ),
    Mutation(
        "_problem/objective",
        "sums of half precision in half precision",
        "return jnp.promote_types(dtype, jnp.float32)",
        "return dtype",
        "objective dtypes stream",
    ),
    Mutation(
        "_loop/step",
        "the value is that of the parameters after",
        "value=seen.astype(dtype),",
        "value=objective.value(moved, *batch).astype(dtype),",
        "step exact honest",
    ),
    Mutation(
        "_loop/step",
        "a step is counted twice",
        "return State(moved, opt_state, state.step + 1, state.run), info",
        "return State(moved, opt_state, state.step + 2, state.run), info",
        "step exact",
    ),
    Mutation(
        "_loop/step",
        "a rule changes its dtype",
        "opt_state = _tree.cast_like(opt_state, state.opt_state)",
        "opt_state = opt_state",
        "dtypes optax_rules step",
    ),
    Mutation(
        "_result/history",
        "a record one row too short",
        "kept = jnp.minimum(slots * (new // old), rows - 1)",
        "kept = jnp.minimum(slots * (new // old), rows - 2)",
        "history",
    ),
    Mutation(
        "_result/history",
        "a record thinned too late",
        "needed = jnp.maximum((count.astype(jnp.uint32) + (rows - 1)) // rows, 1)",
        "needed = jnp.maximum(count.astype(jnp.uint32) // rows, 1)",
        "history",
    ),
    Mutation(
        "_tree",
        "a norm leaves its range",
        "    return jnp.where(_is_resolved(total), jnp.sqrt(total), other)",
        "    return jnp.sqrt(total)",
        "not_finite honest",
    ),
    Mutation(
        "_tree",
        "a norm of NaN is 0",
        "    return jnp.where(most > 0, scaled, most)  # 0, or NaN",
        "    return jnp.where(most > 0, scaled, 0)",
        "not_finite honest",
    ),
    Mutation(
        "_result/diagnosis",
        "an overshot is praised",
        "_SMALL, _EDGE, _RISES, _OVERSHOT = 0.2, 1.8, 2.01, 2.5",
        "_SMALL, _EDGE, _RISES, _OVERSHOT = 0.2, 9.8, 12.01, 12.5",
        "diagnosis",
    ),
    Mutation(
        "_result/curvature",
        "the smallest curvature is the largest",
        "return jnp.fmax(so_far, jnp.nanmax(jnp.where(live, new, jnp.nan)))",
        "return jnp.fmin(so_far, jnp.nanmin(jnp.where(live, new, jnp.nan)))",
        "diagnosis",
    ),
    Mutation(
        "_loop/program",
        "another stop rule inherits a memory",
        "    same = print_ == name\n",
        "    same = print_ == print_\n",
        "stop checkpoint",
    ),
    Mutation(
        "_loop/program",
        "another tolerance inherits a memory",
        "        same = same & jnp.all(jnp.asarray(a) == jnp.asarray(b))\n",
        "        same = same & jnp.bool_(True)\n",
        "stop checkpoint",
    ),
    Mutation(
        "_files/checkpoint",
        "members need not agree with their list",
        "names <= set(members)",
        "True",
        "checkpoint",
    ),
    Mutation(
        "_files/checkpoint",
        "a layout of tomorrow is read",
        "        version <= VERSION,",
        "        True,",
        "checkpoint",
    ),
    Mutation(
        "_call/arrays",
        "more rows a step than there are",
        "    if not 1 <= n <= LAST_STEP:",
        "    if not 0 <= n <= LAST_STEP:",
        "errors",
    ),
    Mutation(
        "_checks",
        "integers are cut to 32 bits",
        "        if not narrow.min <= number <= narrow.max:",
        "        if False:",
        "ordinary errors stream",
    ),
    Mutation(
        "_checks",
        "a rate below 0",
        "    if not (number >= low and (math.isfinite(number) or not finite)):",
        "    if not (math.isfinite(number) or not finite):",
        "errors",
    ),
    Mutation(
        "_devices/layout",
        "axes of parameters are anything",
        "            if not 1 <= more <= _MORE_AXES or np.shape(leaf)[more:] != shape:",
        "            if not 1 <= more <= _MORE_AXES:",
        "shards eight_devices",
    ),
)


def survives(mutation: Mutation, full: bool) -> tuple[str, float]:
    """("" or what saw it: the test that failed, or the clock; seconds)"""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", "*.pyc", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        file = copy / "jaxgd" / f"{mutation.room}.py"
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
        files = [f"tests/test_{name}.py" for name in mutation.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0"]
        command += ["-p", "no:cacheprovider", *(["-m", ""] if full else [])]
        start = time.monotonic()
        try:
            done = subprocess.run(
                command + files,
                cwd=copy,
                env={**os.environ, "PYTHONPATH": str(copy)},
                capture_output=True,
                text=True,
                timeout=_ENDLESS * (4 if full else 1),
            )
        except subprocess.TimeoutExpired:
            return "a loop without end", time.monotonic() - start
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.M)
        seen = failed[1] if failed else "" if done.returncode == 0 else "no import"
        return seen, time.monotonic() - start


def check_all() -> None:
    """Every fault is in the code once."""
    for mutation in MUTATIONS:
        text = (ROOT / "jaxgd" / f"{mutation.room}.py").read_text()
        found = text.count(mutation.old)
        if found != 1:
            sys.exit(f"{mutation.room}: {found} of {mutation.old!r}")


def main() -> None:
    check_all()
    words = [word for word in sys.argv[1:] if word != "--full"]
    chosen = [
        m
        for m in MUTATIONS
        if not words or any(w in m.what or w == m.room for w in words)
    ]
    lines = []
    for mutation in chosen:
        seen, seconds = survives(mutation, "--full" in sys.argv)
        line = f"| `{mutation.room}` | {mutation.what} | {seen or '**none**'} |"
        print(line, f"{seconds:.0f} s", flush=True)
        lines.append(line)
    caught = sum("**none**" not in line for line in lines)
    if not words:
        tier = "both tiers" if "--full" in sys.argv else "the quick tier"
        head = f"# Faults put in, and the test of {tier} that fails\n\n{caught} of "
        head += f"{len(lines)} (`python -m tests.mutations`).\n\n"
        columns = ["| room | fault | seen by |", "| --- | --- | --- |"]
        TABLE.write_text(head + "\n".join(columns + lines) + "\n")
    print(f"{caught} of {len(lines)} seen")


if __name__ == "__main__":
    main()
