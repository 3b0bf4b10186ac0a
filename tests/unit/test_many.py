"""More at once than a database takes parameters in one statement."""

from shared.database import Database, database_url
from shared.native import sleep
from shared.providers import make_provider
from shared.settings import load_settings
from shared.store import log, subscriptions
from shared.types import Envelope, Subscription, new_message_id

COUNT = 25_000

HANDLERS = 600
"""More than SQLite takes parts of one SELECT."""


def test_many_are_stored_in_one_transaction_and_in_their_order(log_settings):
    settings = load_settings(log_settings)
    database, provider = Database(database_url(settings), sleep), make_provider(settings)
    envelopes = [Envelope(new_message_id(), "things", "made", "{}") for _ in range(COUNT)]

    with database.transaction() as tx:
        mine = subscriptions.register(tx, [Subscription("things", "things", "made", "a.b")])
        new = log.append(tx, envelopes, 3)
        provider.publish(new, tx)
        again = log.append(tx, envelopes, 3, again=True)

    assert [delivery.message.id for delivery in new] == [envelope.id for envelope in envelopes]
    assert again == []
    (stats,) = provider.get_queue_stats(mine)
    assert stats.waiting == COUNT
    provider.close()
    database.close()


def test_a_service_may_have_many_handlers(log_settings):
    settings = load_settings(log_settings)
    database, provider = Database(database_url(settings), sleep), make_provider(settings)
    wanted = [Subscription("things", "things", "made", f"a.b{n:03}") for n in range(HANDLERS)]

    with database.transaction() as tx:
        mine = subscriptions.register(tx, wanted)
        provider.publish(
            log.append(tx, [Envelope(new_message_id(), "things", "made", "{}")], 3), tx
        )
        leases = provider.reserve({each.id: 1 for each in mine}, HANDLERS, tx)

    had = sorted(lease.delivery.subscription_id for lease in leases)
    assert had == sorted(each.id for each in mine)
    provider.close()
    database.close()
