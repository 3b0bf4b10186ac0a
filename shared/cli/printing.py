"""How the commands print: tables for people, JSON for programs, progress for who waits."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

WIDTH_ELSEWHERE = 200
"""Columns where there is no terminal: a program cuts lines as it likes."""

with_json = click.option("--json", "is_json", is_flag=True, help="Print JSON.")


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    console = make_console()
    console.print(make_table(columns, rows))


def make_console() -> Console:
    """Return a console that takes what it prints as it is."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_ELSEWHERE
    return console


def make_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table; numbers stand on the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = list(rows)
    for place, name in enumerate(columns):
        are_numbers = rows and all(isinstance(row[place], int | float | None) for row in rows)
        # what would be cut in the middle could not be copied
        table.add_column(name, justify="right" if are_numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(_shown(value)) for value in row])
    return table


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Progress]:
    """Show on standard error how far something is, where that is a terminal; it has one task."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    is_seen = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not is_seen) as made:
        made.add_task(what, total=total)
        yield made
