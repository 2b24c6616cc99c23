"""Contract: what happened in a chunk, told of numbers alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxgd import Status
from jaxgd._loop.advance import Turn, event_of

HELD, RUNNING = Status.GRADIENT_SMALL, Status.RUNNING
STEP, GOAL, SIZE = 8, 20, 16


def happened(codes, bad="", *, count=4, finite=True, verdict=RUNNING, may_hold=True):
    """The event of a chunk from step 8: marks at the steps where something is."""
    places = np.arange(SIZE)
    found = np.where(np.isin(places, [int(c) for c in codes]), HELD, RUNNING)
    lost = np.isin(places, [int(c) for c in bad])
    state = SimpleNamespace(step=np.int32(STEP))
    now = SimpleNamespace(
        state=state, goal=np.int32(GOAL), verdict=np.int32(verdict), most=np.int32(4)
    )
    turn = Turn(np.int32(STEP), np.False_, np.False_, np.int32(count))
    event = event_of(now, turn, found, lost, np.bool_(finite), may_hold, SIZE)
    return tuple(x.item() for x in event)


@pytest.mark.parametrize(
    ("chunk", "goal", "verdict", "counts", "limit"),
    [
        (happened(""), GOAL, RUNNING, True, 8),
        (happened("2"), STEP + 2, HELD, False, 4),
        (happened("13"), STEP + 1, HELD, False, 4),
        (happened("0"), STEP, HELD, False, 4),
        (happened("", "2"), STEP + 1, Status.DIVERGED, False, 4),
        (happened("", "0"), STEP - 1, Status.DIVERGED, False, 4),
        # What comes first counts; an iterate that is not finite is no check.
        (happened("1", "2"), STEP + 1, HELD, False, 4),
        (happened("2", "12"), STEP, Status.DIVERGED, False, 4),
        (happened("2", "2"), STEP + 1, Status.DIVERGED, False, 4),
        # Beyond the last step of the chunk.
        (happened("4"), GOAL, RUNNING, True, 8),
        (happened("", "5"), GOAL, RUNNING, True, 8),
        (happened("0", "0", count=0), GOAL, RUNNING, False, 4),
        # Lost after the last step, which no step saw: halves, then the step itself.
        (happened("", finite=False), GOAL, RUNNING, False, 2),
        (happened("", finite=False, count=1), STEP, Status.DIVERGED, False, 1),
        # Decided before: on the way to its end nothing is asked again.
        (happened("1", "2", verdict=HELD), GOAL, HELD, True, 8),
        (happened("1", may_hold=False), GOAL, RUNNING, True, 8),
    ],
    ids=str,
)
def test_the_first_thing_that_happened(chunk, goal, verdict, counts, limit):
    assert chunk == (goal, verdict, counts, limit)


def test_chunks_grow_up_to_their_size():
    assert happened("", count=SIZE)[3] == 8
    state = SimpleNamespace(step=np.int32(0))
    now = SimpleNamespace(
        state=state, goal=np.int32(99), verdict=np.int32(RUNNING), most=np.int32(SIZE)
    )
    turn = Turn(np.int32(0), np.False_, np.False_, np.int32(SIZE))
    none = np.zeros(SIZE, bool)
    event = event_of(now, turn, np.zeros(SIZE, int), none, np.True_, True, SIZE)
    assert event.chunk_limit == SIZE


def test_a_look_moves_nothing():
    state = SimpleNamespace(step=np.int32(STEP))
    now = SimpleNamespace(
        state=state, goal=np.int32(STEP), verdict=np.int32(RUNNING), most=np.int32(4)
    )
    turn = Turn(np.int32(STEP), np.True_, np.True_, np.int32(1))
    codes = np.where(np.arange(SIZE) == 0, HELD, RUNNING)
    none = np.zeros(SIZE, bool)
    event = event_of(now, turn, codes, none, np.True_, True, SIZE)
    assert (event.goal, event.verdict, event.counts) == (STEP, HELD, False)
    # With a key the last look is another evaluation than that which the rule saw.
    now.verdict = np.int32(HELD)
    event = event_of(now, turn, none * 1, ~none, np.True_, False, SIZE)
    assert (event.goal, event.verdict) == (STEP - 1, Status.DIVERGED)
    now.verdict = np.int32(Status.DIVERGED)
    assert event_of(now, turn, none * 1, ~none, np.True_, False, SIZE).goal == STEP
