"""A few faults of each kind on each backend; ``make soak`` is the same with thousands."""

from __future__ import annotations

import os

import pytest

from tests.faults.driver import run
from tests.faults.faults import Fault, plan
from tests.faults.world import BACKENDS

pytestmark = pytest.mark.flow

FAULTS, EVENTS = 6, 101

KILLED = ("sink-0", "source-0", "broker", "database")
"""What each backend has to survive, whatever the seed chooses."""

SEED = int(os.environ.get("FAULT_SEED", "20"))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_promises_are_kept(backend, tmp_path):
    done = run(tmp_path, backend, SEED, FAULTS, killed=KILLED, events=EVENTS)

    print(done)
    assert done.account.wrong == []
    assert not done.tracebacks
    assert done.account.stored >= EVENTS


def test_a_seed_chooses_the_same_faults():
    faults = [Fault(f"fault {n}", f"target {n % 3}", lambda _: None, 1) for n in range(9)]

    first, again, other = (plan(faults, seed, 50) for seed in (1, 1, 2))

    assert first == again != other
    assert sum(map(len, first)) == 50
