"""The commands that change something; each is noted in the audit log, with who gave it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from shared.cli.failures import Failure, WrongArgument
from shared.cli.printing import print_json, progress, with_json
from shared.cli.working import (
    PRIORITY,
    actor,
    are_none,
    limit_option,
    name,
    operations,
    time,
    with_filters,
)
from shared.errors import NothingToRetryError
from shared.events.direct import DirectOperations
from shared.events.replays import BATCH
from shared.events.retention import Pruner, prune_now
from shared.settings import Settings
from shared.store.listing import Filters
from shared.store.retention import Removed
from shared.types import MAX_RETRIES_LIMIT

MOST = 10_000_000
"""The most that one command changes, where a limit is given."""

group_option = click.option("--group", help="All dead letters with this fingerprint.")


def say(is_json: bool, answer: dict[str, Any], text: str) -> None:
    """Print what was done."""
    if is_json:
        print_json(answer)
    else:
        click.echo(text)


@click.command()
@click.argument("message_id", required=False)
@group_option
@with_filters(has_status=False)
@click.option("--all", "takes_all", is_flag=True, help="All dead letters, without a filter.")
@limit_option(MOST)
@with_json
@click.pass_obj
def retry(
    settings: Settings,
    message_id: str | None,
    group: str | None,
    filters: Filters,
    takes_all: bool,
    limit: int | None,
    is_json: bool,
) -> None:
    """Let dead letters run again: of MESSAGE_ID, of a group, or of the messages that fit filters.

    --limit counts messages with filters, and dead letters of a group.
    """
    _check_one(message_id, group, None if are_none(filters) else filters, takes_all or None)
    with operations(settings) as opened:
        if message_id:
            count = opened.retry_message(actor(), message_id)
            say(is_json, {"messageId": message_id, "retried": count}, f"{count} retried")
        elif group:
            _of_group(opened, group, limit, opened.retry_group, "retried", is_json)
        else:
            done = _retry_matching(opened, filters, limit)
            text = f"{done['retried']} retried, of {done['messages']} messages"
            say(is_json, done, text)


def _check_one(*ways: Any) -> None:
    """Refuse to guess what is meant."""
    if sum(way is not None for way in ways) != 1:
        raise click.UsageError("name a message, or --group, or filters (or --all): one of these")


def _retry_matching(
    opened: DirectOperations, filters: Filters, limit: int | None
) -> dict[str, int]:
    done = {"messages": 0, "retried": 0}
    cursor: str | None = None
    with progress("retrying messages") as shown:
        while limit is None or done["messages"] < limit:
            left = BATCH if limit is None else min(BATCH, limit - done["messages"])
            page = opened.retry_matching(actor(), filters, cursor, left)
            done = {key: done[key] + page[key] for key in done}
            shown.update(shown.task_ids[0], completed=done["messages"])
            cursor = page["nextCursor"]
            if cursor is None:
                break
    return done


def _of_group(
    opened: DirectOperations,
    group: str,
    limit: int | None,
    change: Callable[[str, str, int], dict[str, int]],
    word: str,
    is_json: bool,
) -> None:
    """Change what a group has now; what comes back to it meanwhile is left there."""
    size = opened.group_size(group)
    total = size if limit is None else min(size, limit)
    answer = change(actor(), group, min(BATCH, max(total, 1)))
    done = answer[word]
    with progress(f"{group}: {word}", total) as shown:
        while done < total and answer[word]:
            shown.update(shown.task_ids[0], completed=done)
            with contextlib.suppress(NothingToRetryError):
                answer = {word: 0, "remaining": 0}
                answer = change(actor(), group, min(BATCH, total - done))
            done += answer[word]
        shown.update(shown.task_ids[0], completed=done)
    answer = {word: done, "remaining": answer["remaining"]}
    say(is_json, answer, f"{done} {word}, {answer['remaining']} remaining")


@click.command()
@click.argument("message_id", required=False)
@group_option
@limit_option(MOST)
@with_json
@click.pass_obj
def discard(
    settings: Settings, message_id: str | None, group: str | None, limit: int | None, is_json: bool
) -> None:
    """Give up the dead letters of MESSAGE_ID, or of a group."""
    _check_one(message_id, group)
    with operations(settings) as opened:
        if group:
            _of_group(opened, group, limit, opened.discard_group, "discarded", is_json)
        else:
            count = opened.discard_message(actor(), str(message_id))
            say(is_json, {"messageId": message_id, "discarded": count}, f"{count} discarded")


@click.command()
@click.option("--dry-run", is_flag=True, help="Only count them.")
@with_json
@click.pass_obj
def prune(settings: Settings, dry_run: bool, is_json: bool) -> None:
    """Remove finished messages that are kept no longer.

    QUEUE_KEEP_COMPLETED_DAYS and QUEUE_KEEP_DEAD_DAYS say how long they are.
    """
    with operations(settings) as opened, progress("messages") as shown:

        def show(done: Removed) -> bool:
            shown.update(shown.task_ids[0], completed=done.messages)
            return True

        client = opened.client
        if dry_run:
            done = Pruner(client, client, actor(), show).count()
        else:
            done = prune_now(client, client, actor(), show)
    answer = {"messages": done.messages, "removed": not dry_run}
    word = "would be removed" if dry_run else "removed"
    say(is_json, answer, f"{done.messages} messages {word}")


@click.command()
@click.argument("message_id")
@with_json
@click.pass_obj
def cancel(settings: Settings, message_id: str, is_json: bool) -> None:
    """Discard what waits of MESSAGE_ID; what a worker has goes on."""
    with operations(settings) as opened:
        count = opened.cancel(actor(), message_id)
    say(is_json, {"messageId": message_id, "cancelled": count}, f"{count} cancelled")


def _which(subscription: int | None, queue: str | None) -> None:
    if (subscription is None) == (queue is None):
        raise click.UsageError("name a subscription by its id, or --queue")


@click.command()
@click.argument("subscription", type=click.IntRange(1), required=False)
@click.option("--queue", type=name, help="All subscriptions that this queue has now.")
@with_json
@click.pass_obj
def pause(settings: Settings, subscription: int | None, queue: str | None, is_json: bool) -> None:
    """Have nothing more handed out for SUBSCRIPTION, an id; what is in hand goes on."""
    _pause(settings, subscription, queue, True, is_json)


@click.command()
@click.argument("subscription", type=click.IntRange(1), required=False)
@click.option("--queue", type=name, help="All subscriptions of this queue.")
@with_json
@click.pass_obj
def resume(settings: Settings, subscription: int | None, queue: str | None, is_json: bool) -> None:
    """Take back the pause of SUBSCRIPTION, an id."""
    _pause(settings, subscription, queue, False, is_json)


def _pause(
    settings: Settings, subscription: int | None, queue: str | None, is_paused: bool, is_json: bool
) -> None:
    _which(subscription, queue)
    with operations(settings) as opened:
        if queue is not None:
            changed = opened.pause_queue(actor(), queue, is_paused)
            if changed is None:
                raise Failure(f"no queue {queue}")
        else:
            change = opened.pause if is_paused else opened.resume
            changed = change(actor(), int(subscription or 0))
    ids = ", ".join(map(str, changed["subscriptions"]))
    say(is_json, changed, f"{'paused' if is_paused else 'resumed'}: {ids}")


@click.command()
@click.argument("subscription", type=click.IntRange(1))
@with_json
@click.pass_obj
def retire(settings: Settings, subscription: int, is_json: bool) -> None:
    """End SUBSCRIPTION, an id, whose handler is gone, and discard what waits for it."""
    with operations(settings) as opened:
        retired = opened.retire(actor(), subscription)
    say(is_json, retired, f"retired: {subscription}")


@click.command()
@click.argument("subscription", type=click.IntRange(1))
@click.option("--since", type=time, help="Stored at this time or later; else from the first.")
@click.option("--until", type=time, help="Stored before this time; else up to now.")
@click.option("--again", is_flag=True, help="Those as well that it had, if that is done with.")
@click.option("--mark", type=click.IntRange(0), help="Go on with what --again had begun.")
@with_json
@click.pass_obj
def replay(
    settings: Settings,
    /,
    subscription: int,
    since: datetime | None,
    until: datetime | None,
    again: bool,
    mark: int | None,
    is_json: bool,
) -> None:
    """Deliver a stretch of history to SUBSCRIPTION, an id, and to no other: what it never had.

    May be broken off, and given again: no message is delivered twice, with --again if --mark
    is given as well.
    """
    if mark is not None and not again:
        raise click.UsageError("--mark is for --again")
    since, until = (each and each.replace(tzinfo=None) for each in (since, until))
    done: dict[str, int] = {"messages": 0, "replayed": 0}
    cursor: str | None = None
    with operations(settings) as opened, progress("replaying messages") as shown:
        while True:
            page = opened.replay(
                actor(),
                subscription,
                since=since,
                until=until,
                again=again,
                mark=mark,
                cursor=cursor,
            )
            if again and mark is None:
                mark = page["mark"]
                click.echo(f"to go on with it: --mark {mark}", err=True)
            done = {key: done[key] + page[key] for key in done}
            shown.update(shown.task_ids[0], completed=done["messages"])
            cursor = page["nextCursor"]
            if cursor is None:
                break
    text = f"{done['replayed']} replayed, of {done['messages']} messages"
    say(is_json, {**done, "mark": mark}, text)


@click.command()
@click.argument("queue", type=name)
@click.argument("message_type", metavar="TYPE", type=name)
@click.argument("payload", default="{}")
@click.option("--priority", type=PRIORITY)
@click.option("--metadata", help="A JSON object that travels along.")
@click.option("--scheduled-at", type=time, help="Not handled before this time.")
@click.option("--delay", type=float, help="Not handled before so many seconds are over.")
@click.option("--max-retries", type=click.IntRange(0, MAX_RETRIES_LIMIT))
@click.option("--dedupe-key", help="What is published again with it is not stored again.")
@with_json
@click.pass_obj
def publish(
    settings: Settings,
    /,
    queue: str,
    message_type: str,
    payload: str,
    metadata: str | None,
    scheduled_at: datetime | None,
    is_json: bool,
    **options: Any,
) -> None:
    """Publish one message into QUEUE; PAYLOAD is JSON, and - reads it from standard input."""
    body = as_json("PAYLOAD", sys.stdin.read() if payload == "-" else payload)
    kept = None if metadata is None else as_json("--metadata", metadata)
    with operations(settings) as opened:
        message_id = opened.publish_as(
            actor(),
            queue_name=queue,
            message_type=message_type,
            payload=body,
            metadata=kept,
            scheduled_at=scheduled_at,
            **options,
        )
    say(is_json, {"messageId": message_id}, message_id)


def as_json(name: str, text: str) -> Any:
    """Return what a JSON text says.

    :raises WrongArgument: when it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise WrongArgument(f"{name}: is not JSON: {exc}") from exc
