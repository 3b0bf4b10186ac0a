"""The account itself: of a world in which nothing was broken it finds what is made wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import eventlet
import pytest
from sqlalchemy import text

from shared.database import database_url, make_engine
from tests.faults.account import check, unexpected
from tests.faults.driver import restless, settle
from tests.faults.world import World
from tests.support.processes import NamekoProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

ONE_OF = "(SELECT id FROM queue_messages WHERE message_type = '{}' ORDER BY id LIMIT 1)"

WHERE_GROUPED = f"WHERE message_id = {ONE_OF.format('unit.grouped')}"


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world in which events flowed, and which is over."""
    world = World(tmp_path_factory.mktemp("quiet"), "sqlite")
    try:
        world.start(sources=1, sinks=1)
        wait_until(lambda: is_enough(world), 60, world.state)
        account = settle(world)
    finally:
        world.close()
    assert account.wrong == []
    copy(world.folder, world.folder.with_suffix(".kept"))
    return world


@pytest.fixture
def world(quiet: World) -> Iterator[World]:
    yield quiet
    shutil.rmtree(quiet.folder)
    copy(quiet.folder.with_suffix(".kept"), quiet.folder)


def copy(folder: Path, target: Path) -> None:
    # sockets of those who were killed cannot be copied
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("wake*"))


def is_enough(world: World) -> bool:
    """Whether there is something of each kind."""
    said = world.record.read_text()
    kinds = ('"what": "stored"', '"what": "committed"', '"what": "rolled back"', '"fail": ')
    handled = {each["handler"] for each in world.flow.effects.all(what="ran")}
    return all(kind in said for kind in kinds) and len(handled) == 4


def wrong(world: World) -> str:
    engine = make_engine(database_url(world.flow.settings), eventlet.sleep)
    with engine.connect() as connection:
        found = check(world, connection).wrong
    engine.dispose()
    return "\n".join(found)


def change(world: World, name: str, *statements: str) -> None:
    engine = make_engine(database_url(world.flow.settings, name), eventlet.sleep)
    with engine.begin() as connection:
        for statement in statements:
            assert connection.execute(text(statement)).rowcount > 0, statement
    engine.dispose()


def rewrite(path: Path, change_line: Callable[[dict[str, Any]], Any]) -> None:
    """Change the first line for which ``change_line`` returns something; "" leaves it out."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        changed = change_line(json.loads(line))
        if changed is not None:
            lines[number : number + 1] = [json.dumps(changed)] if changed else []
            break
    else:
        raise AssertionError("no line to be changed")
    path.write_text("".join(f"{line}\n" for line in lines))


def test_what_is_as_it_should_be_is_not_wrong(world: World) -> None:
    assert wrong(world) == ""


@pytest.mark.parametrize(
    ("name", "statements", "said"),
    [
        pytest.param(
            "queue",
            [
                f"DELETE FROM queue_messages WHERE id = {ONE_OF.format('unit.sent')}",
            ],
            "it is not stored (P1)|its row is committed, and the event is not stored (P3)",
            id="a message is gone",
        ),
        pytest.param(
            "queue",
            [f"DELETE FROM queue_deliveries WHERE message_id = {ONE_OF.format('unit.sent')}"],
            "and went to [] (P4)",
            id="deliveries are gone",
        ),
        pytest.param(
            "queue",
            [f"UPDATE queue_deliveries SET attempts = attempts + 1 {WHERE_GROUPED}"],
            "has 2 attempts, not 1 (P8)",
            id="an attempt is burnt",
        ),
        pytest.param(
            "queue",
            [f"UPDATE queue_deliveries SET status = 'retry', processed_at = NULL {WHERE_GROUPED}"],
            "is retry (None), not completed (P4)",
            id="one waits for ever",
        ),
        pytest.param(
            "sink",
            ["INSERT INTO sink_bookings (n) SELECT n FROM sink_bookings LIMIT 1"],
            "is booked 2 times (P5)",
            id="an effect happened twice",
        ),
        pytest.param(
            "sink",
            ["DELETE FROM sink_bookings WHERE id = (SELECT min(id) FROM sink_bookings)"],
            "is completed, and not booked (P5)",
            id="an effect did not happen",
        ),
        pytest.param(
            "source",
            ["DELETE FROM source_units WHERE n = (SELECT min(n) FROM source_units)"],
            "the event is stored, and its row was not committed (P3)",
            id="a row was rolled back",
        ),
        pytest.param(
            "source",
            ["INSERT INTO source_units (n) VALUES ('unheard of')"],
            "unheard of: its row is committed, and the event is not stored (P3)",
            id="an event was not relayed",
        ),
    ],
)
def test_what_is_wrong_in_a_database_is_found(
    world: World, name: str, statements: list[str], said: str
) -> None:
    change(world, name, *statements)
    assert any(each in wrong(world) for each in said.split("|"))


LOST = """\
Traceback (most recent call last):
  File "pool.py", line 1, in connect
pymysql.err.OperationalError: (2003, "Can't connect")

The above exception was the direct cause of the following exception:

"""
DUPLICATE = """\
Traceback (most recent call last):
  File "inbox.py", line 1, in _begin
sqlalchemy.exc.IntegrityError: (1062, "Duplicate entry")
[SQL: INSERT INTO sink_inbox]
(Background on this error at: somewhere)

During handling of the above exception, another exception occurred:

"""
ENDED = """\
Traceback (most recent call last):
  File "handler.py", line 1, in {}
sqlalchemy.exc.OperationalError: (2003, "Can't connect")
[SQL: SELECT 1]
2026-11-30 02:05:01,117 INFO    what comes next
"""


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (ENDED.format("_run_once"), {}),
        (DUPLICATE + LOST + ENDED.format("_run_once"), {}),
        (ENDED.format("_turn"), {'sqlalchemy.exc.OperationalError: (2003, "Can\'t connect")': 1}),
        (LOST + ENDED.format("_turn") + "Traceback (most recent call last):\n  x\nKeyError: 1\n", {
            'sqlalchemy.exc.OperationalError: (2003, "Can\'t connect")': 1,
            "KeyError: 1": 1,
        }),
    ],
    ids=["a handler's database", "more than one line of it", "another's database", "two"],
)  # fmt: skip
def test_what_nothing_explains_is_found_in_a_log(said: str, found: dict[str, int]) -> None:
    assert unexpected(said) == found


class Ready:
    """A process that has started, and then does what it is told to."""

    def __init__(self, code: str) -> None:
        command = [sys.executable, "-c", f"print(flush=True)\n{code}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.pid = self.process.pid
        self.processor_seconds = partial(NamekoProcess.processor_seconds, cast(Any, self))
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_who_does_not_rest_is_found() -> None:
    ready = {
        "busy": Ready("while True: pass"),
        "idle": Ready("import signal; signal.pause()"),
    }
    members = [SimpleNamespace(name=name, process=its) for name, its in ready.items()]
    try:
        said = restless(cast(Any, SimpleNamespace(members=members)))
    finally:
        for each in ready.values():
            each.close()
    assert [each.split(" ")[0] for each in said] == ["busy"]


def test_a_refused_event_that_is_stored_is_found(world: World) -> None:
    def refuse(line: dict[str, Any]) -> Any:
        is_one = line["what"] == "stored"
        return {"what": "raised", "names": line["names"], "error": "no"} if is_one else None

    rewrite(world.record, refuse)
    assert "dispatch raised no, and it is stored (P1)" in wrong(world)


def test_an_outcome_without_a_run_is_found(world: World) -> None:
    rewrite(world.flow.effects.path, lambda line: "" if line["handler"] == "note" else None)
    assert "which did not run attempt [1] (P4)" in wrong(world)


def test_an_event_before_its_time_is_found(world: World) -> None:
    rewrite(world.flow.effects.path, lambda line: {**line, "at": line["at"] - 100})
    assert "before its time (P6)" in wrong(world)


def test_an_effect_of_nothing_is_found(world: World) -> None:
    rewrite(
        world.flow.effects.path,
        lambda line: {**line, "id": "none"} if line["what"] == "ran" else None,
    )
    assert "none: was handled by" in wrong(world)
