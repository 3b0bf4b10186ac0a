"""A disk that is full, for the database of the default provider."""

from __future__ import annotations

import pytest

from tests.faults.account import Record
from tests.faults.driver import settle
from tests.faults.faults import full
from tests.faults.world import World
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow


def test_what_does_not_fit_raises_and_what_was_stored_is_handled(tmp_path):
    world = World(tmp_path, "sqlite")
    try:
        world.start(sources=1, sinks=1)
        processes = [member.process for member in world.members]
        with full(world, *processes):
            wait_until(lambda: Record(world.record).raised, 30, world.state)

        account = settle(world)
        assert all(process.process.poll() is None for process in processes)
    finally:
        world.close()

    assert account.wrong == []
    assert account.raised
    assert any("unreachable" in process.output() for process in processes)
