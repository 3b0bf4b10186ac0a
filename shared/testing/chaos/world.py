"""What handlers changed: rows, events, files, and what a test names; to be compared."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Column, MetaData, Table, UniqueConstraint, select

from shared.store import DatabaseSession
from shared.testing.running import RunningService

Row = dict[str, str]
World = dict[str, list[Row]]
"""Rows by what they are of; values as :func:`repr` shows them."""

DELIVERIES, EVENTS, FILES, EFFECTS = "deliveries", "events dispatched", "files", "effects"

OWN_FILES = ("*.db", "*.db-wal", "*.db-shm", "*.lock", "wake*/*")
"""The suite's own files in the data folder."""

LONGEST_CONTENT = 200
"""Bytes of a file that are shown; of a longer one the sum is compared."""


def look(service: RunningService, sent: Iterable[str], effects: Callable[[], Any] | None) -> World:
    """Return what there is, in the working folder.

    :param sent: ids of the messages that the service was sent.
    """
    world: World = {}
    for dependency in service.container.dependencies:
        if isinstance(dependency, DatabaseSession):
            with dependency.Session() as db:
                for table in tables_of(service.container.service_name, dependency):
                    rows = db.execute(select(table)).mappings()
                    world[table.name] = [_shown(row) for row in rows]
    world[EVENTS] = [
        _shown({"type": each.type, "payload": each.payload, "priority": each.priority.value})
        for each in service.dispatched
        if each.id not in sent
    ]
    world[DELIVERIES] = [
        _shown({"event": m["messageType"], "payload": m["payload"], **_ending(d)})
        for m, d in service.deliveries
    ]
    world[FILES] = list(_files(service.settings.data_dir))
    if effects is not None:
        found = effects()
        listed = found if isinstance(found, list | tuple) else [found]
        world[EFFECTS] = [_shown({"effect": each}) for each in listed]
    return world


def tables_of(service: str, dependency: DatabaseSession) -> list[Table]:
    """Return the tables that hold what a service knows: not those by which it gets events."""
    metadata: MetaData = dependency.declarative_base.metadata
    own = {f"{service}_inbox", f"{service}_outbox"}
    return [table for table in metadata.sorted_tables if table.name not in own]


def volatile(first: World, second: World) -> set[tuple[str, str]]:
    """Return which columns cannot be compared: two undisturbed runs differ in them."""
    return {
        (name, column)
        for name, rows in first.items()
        for column in {column for row in rows for column in row}
        if _values(rows, column) != _values(second.get(name, []), column)
    }


class Comparison:
    """Compares worlds without what differs anyhow: keys that a database counts, and ``left_out``.

    A key that refers to a counted one stands for the row that it refers to.
    """

    def __init__(self, tables: Iterable[Table], left_out: set[tuple[str, str]]) -> None:
        self._tables = {table.name: table for table in tables}
        self._left_out = left_out

    def difference(self, expected: World, got: World) -> tuple[list[str], list[str]]:
        """Return what of ``expected`` is missing, and what there is instead or besides."""
        wanted, found = Counter(self._lines(expected)), Counter(self._lines(got))
        return sorted((wanted - found).elements()), sorted((found - wanted).elements())

    def _lines(self, world: World) -> Iterator[str]:
        for name, rows in world.items():
            for row in rows:
                yield f"{name}: {self._line(world, name, row)}"

    def _line(
        self, world: World, name: str, row: Row, only: Collection[str] = (), depth: int = 3
    ) -> str:
        table = self._tables.get(name)
        words = []
        for column, value in row.items():
            its = None if table is None else table.columns.get(column)
            if (only and column not in only) or (its is not None and its is _counted(its.table)):
                continue
            target = None if its is None else _counted_target(its)
            if target is not None and depth:
                words.append(f"{column}={self._referred(world, target, value, depth)}")
            elif (name, column) not in self._left_out and not self._says_less(name, column):
                words.append(f"{column}={value}")
        return ", ".join(words)

    def _says_less(self, name: str, column: str) -> bool:
        """Whether a column only stands in for another one, which can be compared."""
        return (name, column) == (FILES, "lines") and (FILES, "content") not in self._left_out

    def _referred(self, world: World, target: Column[Any], value: str, depth: int) -> str:
        """Return what is special of a row: what may be there once, or else all of it."""
        name = target.table.name
        for row in world.get(name, []):
            if row[target.name] == value:
                line = self._line(world, name, row, _unique(target.table), depth - 1)
                return f"({line})"
        return value


def _unique(table: Any) -> set[str]:
    """Return the columns whose values, alone or together, are there once; no counted key."""
    keys = [each.columns for each in table.constraints if isinstance(each, UniqueConstraint)]
    keys += [index.columns for index in table.indexes if index.unique]
    return {column.name for columns in keys for column in columns}


def _counted(table: Any) -> Column[Any] | None:
    """Return the key that the database counts up, if the table has one."""
    found: Column[Any] | None = table.autoincrement_column
    return found


def _counted_target(column: Column[Any]) -> Column[Any] | None:
    for key in column.foreign_keys:
        if key.column is _counted(key.column.table):
            return key.column
    return None


def _values(rows: list[Row], column: str) -> Counter[str | None]:
    return Counter(row.get(column) for row in rows)


def _shown(row: Mapping[str, Any]) -> Row:
    return {name: repr(value) for name, value in row.items()}


def _ending(delivery: Mapping[str, Any]) -> dict[str, Any]:
    names = ("subscriber", "status", "errorType", "errorMessage")
    return {name: delivery[name] for name in names if delivery[name] is not None}


def _files(data_folder: Path) -> Iterator[Row]:
    own = {path for pattern in OWN_FILES for path in data_folder.glob(pattern)}
    here = Path.cwd()
    for path in sorted(here.rglob("*")):
        if path.is_file() and path not in own:
            content = path.read_bytes()
            yield _shown(
                {
                    "name": str(path.relative_to(here)),
                    "content": _content(content),
                    # what is written twice is seen, though each time it is something else
                    "lines": content.count(b"\n"),
                }
            )


def _content(content: bytes) -> str:
    if len(content) > LONGEST_CONTENT:
        return f"{len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}"
    return content.decode(errors="backslashreplace")


def payload_text(payload: Any) -> str:
    """Return a payload as a report shows it."""
    text = json.dumps(payload, ensure_ascii=False)
    return text if len(text) <= LONGEST_CONTENT else text[:LONGEST_CONTENT] + " ..."
