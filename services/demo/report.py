"""How the demo looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from services.demo.processes import SERVICES, DemoError, ServiceEndedError
from services.demo.verdict import Claim, Event

PLAIN_WIDTH = 120
"""Columns where there is no terminal."""

TIMELINE_WIDTH = 100
"""Columns below which the timeline names a subscriber's service alone."""

LastLines = Callable[[str], list[str]]

STYLES = {"completed": "green", "retry": "yellow", "failed": "red"}


def make_console() -> Console:
    """Return a console that takes what it prints as it is."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def progress(console: Console) -> Progress:
    """Return bars for what takes a while; without a terminal, each as it was at last."""
    return Progress(
        TextColumn("{task.description:<20}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def timeline(console: Console, events: Iterable[Event]) -> None:
    """Print what became of each event, in the order in which they were dispatched."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("person", no_wrap=True, max_width=20)
    table.add_column("event", no_wrap=True)
    table.add_column("subscriber", no_wrap=True)
    table.add_column("try", justify="right")
    table.add_column("after", justify="right")
    table.add_column("outcome")
    for event in events:
        who, what = event.person.name, event.type
        for row in _rows(event, is_narrow=console.width < TIMELINE_WIDTH):
            table.add_row(who, what, *row)
            who = what = ""
    console.print()
    console.print(table)


def _rows(event: Event, is_narrow: bool) -> Iterator[tuple[str, str, str, Text]]:
    for delivery in event.message["deliveries"]:
        subscriber = delivery["subscriber"]
        if is_narrow:
            subscriber = subscriber.partition(".")[0]
        for attempt in delivery["history"]:
            after = event.milliseconds_until(attempt["endedAt"])
            outcome = Text(_failure(event, attempt), STYLES.get(attempt["outcome"], ""))
            yield subscriber, str(attempt["attempt"]), f"{after} ms", outcome
            subscriber = ""
        if delivery["status"] != "failed":
            yield subscriber, *_ending(event, delivery)


def _failure(event: Event, attempt: dict[str, Any]) -> str:
    error = attempt["errorMessage"] or ""
    match attempt["outcome"]:
        case "retry":
            return f"{error}; again at {event.milliseconds_until(attempt['retryAt'])} ms"
        case "failed":
            return f"dead: {error}"
        case other:
            return f"{other} {error}"


def _ending(event: Event, delivery: dict[str, Any]) -> tuple[str, str, Text]:
    status, ended = delivery["status"], delivery["processedAt"]
    after = f"{event.milliseconds_until(ended)} ms" if ended else ""
    return str(delivery["attempts"]), after, Text(status, STYLES.get(status, ""))


def stats(console: Console, found: dict[str, Any]) -> None:
    """Print the statistics of a queue on one line."""
    keys = ("total", "completed", "failed", "retry", "processing", "pending", "unrouted")
    counts = ", ".join(f"{key} {found.get(key)}" for key in keys)
    console.print(f"\nGET /queue/stats/{found.get('queueName')}: {counts}")


def dead_letter(console: Console, event: Event) -> None:
    """Show a message that failed, with its error."""
    console.print(
        f"\nDead letter {event.message['messageId']}, {event.type} of {event.person.name}"
    )
    for delivery in event.message["deliveries"]:
        if delivery["status"] == "failed":
            error = f"{delivery['errorType']}: {delivery['errorMessage']}"
            console.print(f"  {delivery['subscriber']}  {error}", style="red")


def revived(console: Console, event: Event, retried: int) -> None:
    """Tell that it was retried, and what became of it."""
    address, status = event.person.mail_address, event.message["status"]
    console.print(f"The mail server takes {address} from now on.")
    console.print(f"POST /queue/retry/{event.message['messageId']}: {retried} retried, ", end="")
    console.print(f"now {status}", style=STYLES.get(status, ""))


def verdict(console: Console, claims: Iterable[Claim]) -> bool:
    """Print what must be true and what differs; return whether nothing does."""
    is_right = True
    console.print()
    for claim in claims:
        mark, style = ("✗", "red") if claim.differences else ("✓", "green")
        console.print(mark, claim.text, style=style)
        for difference in claim.differences:
            console.print(f"    {difference}")
        is_right = is_right and not claim.differences
    return is_right


def ending(
    console: Console, events: list[Event], is_right: bool, seconds: float, folder: Path
) -> None:
    """Print the summary."""
    by_type = Counter(event.type for event in events)
    deliveries = [each for event in events for each in event.message["deliveries"]]
    failures = sum(len(each["history"]) for each in deliveries)
    counts = ", ".join(f"{count} {event_type}" for event_type, count in by_type.items())
    how = "Everything ended" if is_right else "Not everything ended"
    style = "bold green" if is_right else "bold red"
    console.print(f"\n{how} as it had to, in {seconds:.1f} s", style=style)
    console.print(f"{counts}; {len(deliveries)} deliveries, {failures} attempts failed")
    console.print(f"Mails and logs are in {folder}", soft_wrap=True)


def trouble(console: Console, error: DemoError, last_lines: LastLines | None = None) -> None:
    """Print an error, and the end of the log of the service it is about, else of each."""
    console.print(f"Error: {error}", style="bold red", soft_wrap=True)
    if last_lines is not None:
        about = [error.service] if isinstance(error, ServiceEndedError) else SERVICES
        logs(console, about, last_lines)


def logs(console: Console, services: Iterable[str], last_lines: LastLines) -> None:
    """Print the end of logs."""
    for service in services:
        console.print(f"The end of {service}'s log:", style="bold")
        for line in last_lines(service):
            console.print(f"  {line}", soft_wrap=True)
