"""``queuectl export`` and ``queuectl import``: messages as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import TextIO

import click

from shared.cli.failures import Failure, WrongArgument
from shared.cli.printing import print_json, progress, with_json
from shared.cli.working import actor, are_none, operations, with_filters
from shared.errors import PayloadError
from shared.events import transfer
from shared.events.replays import BATCH
from shared.events.transfer import Import, Imported
from shared.settings import Settings
from shared.store.listing import Filters


@click.command("export")
@click.argument("file", type=click.File("w", encoding="utf-8", atomic=True), default="-")
@with_filters(has_status=True)
@click.pass_obj
def export_messages(settings: Settings, file: TextIO, filters: Filters) -> None:
    """Write messages to FILE, or to standard output, as JSON Lines, the oldest first.

    Without a filter, those of which something waits or is dead; with some, those that fit.
    """
    with operations(settings) as opened:
        ids = transfer.find(opened.reader, filters)
        count = 0
        with progress("exporting", len(ids)) as shown:
            for line in transfer.lines(opened.reader, ids, undone=are_none(filters)):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
                shown.update(shown.task_ids[0], completed=count)
    click.echo(f"{count} exported", err=True)


@click.command("import")
@click.argument("file", type=click.File(encoding="utf-8"), default="-")
@click.option(
    "--restore",
    "is_restoring",
    is_flag=True,
    help="For those subscribers alone at whom they waited or were dead.",
)
@with_json
@click.pass_obj
def import_messages(settings: Settings, file: TextIO, is_restoring: bool, is_json: bool) -> None:
    """Dispatch the messages of FILE, or of standard input, anew, as export wrote them.

    Each becomes a new message that names the old one as its origin. A line that was imported
    before is left out, so an import that broke off is simply done again. Ends with status 1
    where a message could not be restored, since nobody subscribes.
    """
    with operations(settings) as opened, progress("importing") as shown:
        total = Imported()
        for batch in _batches(_read(settings, file)):
            step = transfer.restore if is_restoring else transfer.dispatch
            done = step(opened, actor(), batch)
            total = Imported(
                total.imported + done.imported,
                total.known + done.known,
                total.homeless + done.homeless,
            )
            shown.update(shown.task_ids[0], advance=len(batch))
    if is_json:
        print_json(asdict(total))
    else:
        click.echo(f"{total.imported} imported, {total.known} were imported before")
    if total.homeless:
        raise Failure(f"{total.homeless} not restored: nobody subscribes")


def _read(settings: Settings, file: TextIO) -> Iterator[Import]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield transfer.read_line(settings, line)
        except PayloadError as exc:
            raise WrongArgument(f"line {number}: {exc}; what is before it may be imported") from exc


def _batches(imports: Iterator[Import]) -> Iterator[list[Import]]:
    while batch := list(islice(imports, BATCH)):
        yield batch
