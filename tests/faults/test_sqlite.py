"""The file of the default provider: on a disk that is full, or locked by who froze."""

from __future__ import annotations

import subprocess
import sys
from time import monotonic

import pytest

from shared.database import LOCK_WAIT_SECONDS
from tests.faults.account import Record
from tests.faults.driver import settle
from tests.faults.faults import frozen, full
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


WRITER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE queue_version SET version_num = version_num")
print("locked", flush=True)
time.sleep(3600)
"""


def test_who_froze_in_a_transaction_has_others_raise_and_nothing_is_lost(tmp_path):
    """No process ends another's transaction on a file: it waits, says so, and goes on after it."""
    world = World(tmp_path, "sqlite")
    try:
        world.start(sources=1, sinks=1)
        began = monotonic()
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(world.flow.folder / "var" / "queue.db")],
            stdout=subprocess.PIPE,
        )
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"locked\n"
            with frozen(writer.pid):
                wait_until(lambda: Record(world.record).raised, 30, world.state)
                waited = monotonic() - began
        finally:
            writer.kill()
            writer.wait()

        account = settle(world)
    finally:
        world.close()

    assert waited >= LOCK_WAIT_SECONDS
    assert all("locked" in error for error in Record(world.record).raised.values())
    assert account.wrong == []
    assert account.stored
