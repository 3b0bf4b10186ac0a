"""Statements of the way that each event goes, prepared once.

SQLAlchemy builds and compiles them; what it does at each execution besides (cache
keys, result metadata, events) takes ten times as long as SQLite takes to execute one,
with everybody else's dispatch waiting for the lock meanwhile.
"""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

from sqlalchemy import Connection, Dialect, Enum
from sqlalchemy.exc import DBAPIError

from shared.database import Transaction
from shared.mysql import MOST_WAITING_BYTES, NativeConnection

Processor = Callable[[Any], Any]

_EXPANDING = re.compile(r"__\[POSTCOMPILE_(\w+)\]")
"""Where SQLAlchemy leaves room for the values of an ``IN``."""

_VALUE = re.compile(r"%s|__\[POSTCOMPILE_\w+\]")
"""Where it leaves room for any, with a driver that takes ``%s``."""

_ROW = " VALUES ("
"""What comes before an INSERT's first value."""


MOST_VALUES = 10_000
"""Values of one ``IN``; SQLite takes 32,766 parameters unless it was built for more."""


class Prepared:
    """A statement of SQLAlchemy Core with bound parameters, to be executed often.

    A parameter with ``expanding=True`` takes a sequence.

    :param columns: for an INSERT, the columns that are given.
    """

    def __init__(self, statement: Any, columns: Sequence[str] = ()) -> None:
        self.statement = statement
        self._columns = list(columns)
        self._compiled: dict[str, _Compiled] = {}

    def fetch(
        self, tx: Transaction, values: Mapping[str, Any], *, is_last: bool = False
    ) -> list[Any]:
        """Execute a SELECT, or what returns rows; return these, as named tuples.

        :param is_last: whether nothing else comes in this transaction: its COMMIT may go along.
        """
        compiled = self._for(tx.connection.dialect)
        rows: list[Any] = []
        *others, last = compiled.parts(values)
        for part in others:
            rows += compiled.rows(compiled.fetch(tx.connection, part))
        return rows + compiled.rows(compiled.fetch(tx.connection, last, is_last))

    def change(self, tx: Transaction, values: Mapping[str, Any]) -> None:
        """Execute an INSERT or UPDATE, or a SELECT for its locks, before whatever comes next.

        Its failure may show only there, or at the end of the transaction.
        """
        compiled = self._for(tx.connection.dialect)
        for part in compiled.parts(values):
            compiled.change(tx.connection, part)

    def count_changed(self, tx: Transaction, values: Mapping[str, Any]) -> int:
        """Execute an INSERT or UPDATE; return how many rows matched."""
        compiled = self._for(tx.connection.dialect)
        count = 0
        for part in compiled.parts(values):
            cursor = compiled.execute(tx.connection, part)
            count += cursor.rowcount
            cursor.close()
        return count

    def change_many(self, tx: Transaction, rows: Sequence[Mapping[str, Any]]) -> None:
        """Execute an INSERT or UPDATE for each row, as :meth:`change` does.

        It may have no expanding parameter.
        """
        self._for(tx.connection.dialect).execute_many(tx.connection, rows)

    def _for(self, dialect: Dialect) -> _Compiled:
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = self._compiled[dialect.name] = _Compiled(
                self.statement, self._columns, dialect
            )
        return compiled


class _Compiled:
    """A statement as one dialect writes it, and how its values are turned for the driver."""

    def __init__(self, statement: Any, columns: list[str], dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=columns or None)
        self._dialect = dialect
        self._sql = str(compiled)
        self._mark = "?" if dialect.paramstyle == "qmark" else "%s"
        self._names: list[str] = compiled.positiontup or []
        # what stands between the values, where they are written into the statement here
        self._before, *between = [text.replace("%%", "%") for text in _VALUE.split(self._sql)]
        self._expanding = set(_EXPANDING.findall(self._sql))
        self._fixed = {
            name: bind.value for name, bind in compiled.binds.items() if not bind.required
        }
        self._to_driver = {
            name: processor
            for name, bind in compiled.binds.items()
            if (processor := _bind_processor(bind.type, dialect)) is not None
        }
        self._places = [
            (name, self._to_driver.get(name), after)
            for name, after in zip(self._names, between, strict=self._mark != "?")
        ]
        selected = list(getattr(statement, "exported_columns", ()))
        names = [column.name for column in selected]
        row_type: Any = namedtuple("row_type", names)  # type: ignore[misc]
        self._make_row = row_type._make
        self._from_driver = [
            (place, processor)
            for place, column in enumerate(selected)
            if (processor := _result_processor(column.type, dialect)) is not None
        ]

    def parts(self, values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield the values in parts that a database takes, where one is a long sequence."""
        long = [name for name in self._expanding if len(values[name]) > MOST_VALUES]
        if not long:
            yield values
            return
        (name,) = long
        for start in range(0, len(values[name]), MOST_VALUES):
            yield {**values, name: values[name][start : start + MOST_VALUES]}

    def fetch(
        self, connection: Connection, values: Mapping[str, Any], is_last: bool = False
    ) -> Sequence[Any]:
        driver = _driver(connection)
        if isinstance(driver, NativeConnection):
            sql = self._written(driver, values)
            with self._translating(sql, connection):
                return driver.fetch_and_commit(sql) if is_last else driver.fetch(sql)
        cursor = self.execute(connection, values)
        rows: Sequence[Any] = cursor.fetchall()
        cursor.close()
        return rows

    def change(self, connection: Connection, values: Mapping[str, Any]) -> None:
        driver = _driver(connection)
        if isinstance(driver, NativeConnection):
            sql = self._written(driver, values)
            with self._translating(sql, connection):
                driver.later(sql)
        else:
            self.execute(connection, values).close()

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        sql, parameters = self._sql, self._parameters(values)
        if self._expanding:
            sql = _EXPANDING.sub(lambda at: self._marks(values[at[1]]), sql)
        cursor = _driver(connection).cursor()
        with self._translating(sql, connection):
            cursor.execute(sql, parameters)
        return cursor

    def execute_many(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        driver = _driver(connection)
        with self._translating(self._sql, connection):
            if isinstance(driver, NativeConnection):
                for sql in self._written_many(driver, rows):
                    driver.later(sql)
            else:
                with closing(driver.cursor()) as cursor:
                    cursor.executemany(self._sql, [self._parameters(row) for row in rows])

    def rows(self, fetched: Sequence[Any]) -> list[Any]:
        if not self._from_driver:
            return [self._make_row(each) for each in fetched]
        made = []
        for each in fetched:
            values = list(each)
            for place, processor in self._from_driver:
                values[place] = processor(values[place])
            made.append(self._make_row(values))
        return made

    def _parameters(self, values: Mapping[str, Any]) -> list[Any]:
        parameters: list[Any] = []
        for name in self._names:
            value = values[name] if name in values else self._fixed[name]
            if name in self._expanding:
                parameters.extend(value)
            elif name in self._to_driver:
                parameters.append(self._to_driver[name](value))
            else:
                parameters.append(value)
        return parameters

    def _marks(self, values: Sequence[Any]) -> str:
        # nothing is in (NULL), and (), which would say so better, not every database takes
        return ", ".join([self._mark] * len(values)) or "NULL"

    def _written(self, driver: NativeConnection, values: Mapping[str, Any]) -> str:
        """Return the statement with its values in it."""
        parts, literal = [self._before], driver.literal
        for name, process, after in self._places:
            value = values[name] if name in values else self._fixed[name]
            if name in self._expanding:
                # as _marks does it
                parts.append(", ".join(map(literal, value)) or "NULL")
            else:
                parts.append(literal(value if process is None else process(value)))
            parts.append(after)
        return "".join(parts)

    def _written_many(
        self, driver: NativeConnection, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[str]:
        """Yield the statement for each row; an INSERT takes many rows."""
        head, values, _ = self._sql.partition(_ROW)
        if not values:
            yield from (self._written(driver, row) for row in rows)
            return
        gathered: list[str] = []
        size = 0
        for row in rows:
            written = self._written(driver, row)[len(head) + len(_ROW) - 1 :]
            if gathered and size + len(written) > MOST_WAITING_BYTES:
                yield f"{head} VALUES {', '.join(gathered)}"
                gathered, size = [], 0
            gathered.append(written)
            size += len(written)
        if gathered:
            yield f"{head} VALUES {', '.join(gathered)}"

    @contextmanager
    def _translating(self, sql: str, connection: Connection) -> Iterator[None]:
        try:
            yield
        except self._dialect.loaded_dbapi.Error as exc:
            raise self._translated(exc, sql, connection) from exc

    def _translated(self, error: Any, sql: str, connection: Connection) -> Exception:
        """Return the exception that SQLAlchemy would have raised."""
        is_lost = self._dialect.is_disconnect(error, connection.connection, None)
        return DBAPIError.instance(
            sql,
            None,
            error,
            self._dialect.loaded_dbapi.Error,
            connection_invalidated=is_lost,
            dialect=self._dialect,
        )


def _driver(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


def _bind_processor(type_: Any, dialect: Dialect) -> Processor | None:
    processor: Processor | None = type_.dialect_impl(dialect).bind_processor(dialect)
    return processor


def _result_processor(type_: Any, dialect: Dialect) -> Processor | None:
    if isinstance(type_, Enum):
        return None  # words: it would look up each, to find the same
    processor: Processor | None = type_.dialect_impl(dialect).result_processor(dialect, None)
    return processor
