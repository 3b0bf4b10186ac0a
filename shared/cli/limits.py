"""``queuectl limit``: how much of a subscription is handled at most, over all processes."""

from __future__ import annotations

from typing import Any

import click

from shared.cli.printing import print_json, with_json
from shared.cli.working import NumberRange, actor, operations
from shared.settings import Settings
from shared.store.limits import HIGHEST_RATE, LOWEST_RATE, MOST_AT_ONCE, Limits

_COUNT = click.IntRange(1, MOST_AT_ONCE)


@click.command()
@click.argument("subscription", type=click.IntRange(1))
@click.option(
    "--rate",
    type=NumberRange(LOWEST_RATE, HIGHEST_RATE),
    help="Attempts that begin in a second, retries included.",
)
@click.option("--burst", type=_COUNT, help="Attempts that may begin together; a tenth of --rate.")
@click.option("--concurrency", type=_COUNT, help="Deliveries in hand at once.")
@click.option("--none", "is_none", is_flag=True, help="Without limits from now on.")
@with_json
@click.pass_obj
def limit(
    settings: Settings,
    subscription: int,
    rate: float | None,
    burst: int | None,
    concurrency: int | None,
    is_none: bool,
    is_json: bool,
) -> None:
    """Handle no more of SUBSCRIPTION, an id, than that, over all processes.

    A limit that is not named is taken away.
    """
    wanted = Limits(concurrency, rate, burst)
    if wanted.are_none != is_none:
        raise click.UsageError("--none, or at least one of --rate and --concurrency")
    if burst is not None and rate is None:
        raise click.UsageError("--burst needs --rate")
    with operations(settings) as opened:
        done = opened.limit(actor(), subscription, wanted)
    if is_json:
        print_json(done)
    else:
        click.echo(f"subscription {subscription}: {limits_text(done['limits'])}")


def limits_text(limits: dict[str, Any] | None) -> str:
    """Return limits as a person says them."""
    if limits is None:
        return "no limits"
    rate, concurrency = limits["rate"], limits["concurrency"]
    its = [
        None if rate is None else f"{rate:g} a second, {limits['burst']} together",
        None if concurrency is None else f"{concurrency} at once",
    ]
    return "; ".join(each for each in its if each)
