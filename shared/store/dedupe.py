"""Dispatches that are known by a key: what has the same key is stored once.

Between processes the table decides: who inserts a key that somebody else inserted since it
was looked for begins the transaction again, and then finds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import bindparam, delete, insert, select

from shared.database import Transaction
from shared.statements import Prepared
from shared.tables import dedupe_keys
from shared.types import Envelope

DEDUPE_SECONDS = 24 * 3600
"""How long a key is kept. Who tries again does so sooner, and most keys are never met again."""

REMOVED_FOR_ONE = 2
"""Expired keys that are removed for each one that is added, so that they cannot pile up."""

c = dedupe_keys.c
_FOUND = Prepared(
    select(c.dedupe_key, c.queue_name, c.message_id, c.fingerprint, c.expires_at).where(
        c.dedupe_key.in_(bindparam("keys", expanding=True))
    )
)
_ADD = Prepared(insert(dedupe_keys), [column.name for column in c])
_EXPIRED = Prepared(
    select(c.dedupe_key, c.queue_name)
    .where(c.expires_at <= bindparam("now"))
    .order_by(c.expires_at)
    .limit(bindparam("most"))
    # another process is about to remove these
    .with_for_update(skip_locked=True)
)
_REMOVE = Prepared(
    delete(dedupe_keys).where(
        c.dedupe_key == bindparam("its_key"), c.queue_name == bindparam("its_scope")
    )
)


class First(NamedTuple):
    """The message that had a key first, and the fingerprint that came with it."""

    message_id: str
    fingerprint: str | None


def known(tx: Transaction, envelopes: Iterable[Envelope]) -> dict[str, First]:
    """Find out which of these have a key that was seen before; keep the other keys.

    Each is to be stored in the same transaction, but for those that are returned.

    :returns: by message id what had the key first; it may be one of ``envelopes``.
    """
    keyed = [envelope for envelope in envelopes if envelope.dedupe is not None]
    if not keyed:
        return {}
    kept, expired = _kept(tx, keyed)
    seen, new = {}, []
    for envelope in keyed:
        name = _name(envelope)
        if name in kept:
            seen[envelope.id] = kept[name]
        else:
            kept[name] = First(envelope.id, envelope.dedupe.fingerprint)  # type: ignore[union-attr]
            new.append(envelope)
    if new:
        _remove(tx, expired, most=REMOVED_FOR_ONE * len(new))
        _ADD.change_many(tx, [_row(tx, envelope) for envelope in new])
    return seen


def _kept(
    tx: Transaction, keyed: Sequence[Envelope]
) -> tuple[dict[tuple[str, str], First], list[tuple[str, str]]]:
    """Return what is known by the keys, and which of them are over."""
    rows: list[Any] = _FOUND.fetch(tx, {"keys": list({_name(each)[1] for each in keyed})})
    kept, expired = {}, []
    for row in rows:
        if row.expires_at > tx.now:
            kept[row.queue_name, row.dedupe_key] = First(row.message_id, row.fingerprint)
        else:
            expired.append((row.queue_name, row.dedupe_key))
    return kept, expired


def _remove(tx: Transaction, expired: Sequence[tuple[str, str]], most: int) -> None:
    """Remove these, and some of the others that are over."""
    others: list[Any] = _EXPIRED.fetch(tx, {"now": tx.now, "most": most})
    names = sorted({*expired, *((row.queue_name, row.dedupe_key) for row in others)})
    if names:
        _REMOVE.change_many(tx, [{"its_scope": scope, "its_key": key} for scope, key in names])


def _name(envelope: Envelope) -> tuple[str, str]:
    assert envelope.dedupe is not None  # noqa: S101 - for the type alone
    return envelope.dedupe.scope, envelope.dedupe.key


def _row(tx: Transaction, envelope: Envelope) -> dict[str, Any]:
    scope, key = _name(envelope)
    return {
        "dedupe_key": key,
        "queue_name": scope,
        "message_id": envelope.id,
        "fingerprint": envelope.dedupe.fingerprint if envelope.dedupe else None,
        "expires_at": tx.later(DEDUPE_SECONDS),
    }
