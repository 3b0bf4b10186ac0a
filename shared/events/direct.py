"""Working on the log and its provider from a process that runs no service: a command.

What a service's pump does between two threads, this does in one, for one caller who waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from shared.database import CommitUncertainError, Database, Transaction, database_url
from shared.errors import (
    DispatchError,
    DispatchUncertainError,
    ProviderError,
    ProviderRefusedError,
    StoreUnavailableError,
)
from shared.events.alerts import Alerts
from shared.events.carrier import arrived_at
from shared.events.client import first_id, handover_of
from shared.events.ramps import Ramps
from shared.events.repairs import Operations
from shared.events.schedules import Schedules
from shared.native import sleep
from shared.providers import QueueProvider, draining_settings, make_provider
from shared.settings import Settings
from shared.store import backlog, dedupe, log
from shared.store.dedupe import First
from shared.store.log import Handover
from shared.store.migrate import see_log
from shared.types import Delivery, Envelope, Subscription

AGAIN_SECONDS = 0.2
"""How soon what others have before it is looked for again."""

RELAY_SECONDS = 15.0
"""How long it is tried to hand over to the provider what a call put back. By then whoever has
what comes before it counts as slow; services go on with what is left."""


class DirectClient:
    """What :class:`~shared.events.client.QueueClient` is to a service.

    ``notices`` are what its user should know, though all went well.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.notices: list[str] = []
        self._provider = make_provider(settings)
        self._database = Database(database_url(settings), sleep)
        self._is_checked = self._is_connected = False

    def close(self) -> None:
        """Close what is open. Never raises."""
        self.notices += self._provider.notices
        self._provider.close()
        self._database.close()

    @property
    def joins_log(self) -> bool:
        """Whether the provider works in the log's own tables."""
        return self._provider.capabilities.joins_log

    @property
    def handover(self) -> Handover:
        """What becomes of what a call appends: as if the provider were away.

        So what is older goes before it.
        """
        return handover_of(self._provider.capabilities)

    def read(self, query: Callable[..., Any], *args: Any) -> Any:
        """Return what ``query(connection, *args)`` returns.

        :raises StoreUnavailableError: when the database does not answer.
        """
        self._check_tables()
        return self._database.read(lambda tx: query(tx.connection, *args))

    def call(self, function: Callable[[Transaction], tuple[Any, list[Delivery]]]) -> Any:
        """Run ``function`` in a transaction of the log; publish the deliveries that it returns.

        :returns: the first thing that ``function`` returns.
        :raises QueueError: what it raises, or StoreUnavailableError.
        """
        value, new = self._run(partial(self._call, function))
        self._hand_over(new)
        return value

    def append(self, envelopes: Sequence[Envelope]) -> list[str]:
        """Store events; return the message ids, of what was dispatched before that one's.

        :raises DispatchError: when nothing was stored.
        :raises DispatchUncertainError: when that could not be found out.
        :raises DedupeConflictError: when the key came before with another fingerprint.
        """
        try:
            new, firsts = self._run(partial(self._append, envelopes))
        except CommitUncertainError as exc:
            raise DispatchUncertainError([each.id for each in envelopes], str(exc)) from exc
        except (StoreUnavailableError, SQLAlchemyError) as exc:
            raise DispatchError(f"nothing was stored: {exc}") from exc
        self._hand_over(new)
        return [first_id(envelope, firsts.get(envelope.id)) for envelope in envelopes]

    def ask(self, function: Callable[[QueueProvider], Any]) -> Any:
        """Return what ``function`` returns, done with the provider.

        :raises ProviderError: what it raises, or ProviderUnavailableError.
        """
        self._connect()
        return function(self._provider)

    def ask_all(self, function: Callable[[QueueProvider], Any]) -> None:
        """Do something with the provider, and first with the one that is moved away from.

        :raises ProviderError: what it raises, or ProviderUnavailableError.
        """
        if self.settings.drain:
            old = make_provider(draining_settings(self.settings))
            try:
                old.initialize()
                function(old)
            finally:
                old.close()
        self.ask(function)

    def health(self) -> bool:
        """Say whether the provider answers."""
        try:
            return bool(self.ask(lambda provider: provider.health_check()))
        except ProviderError:
            return False

    def forget(self, gone: Sequence[Subscription]) -> None:
        """Have the provider remove subscriptions that were retired."""
        for each in gone:
            try:
                self.ask(partial(_forget, subscription=each))
            except ProviderError as exc:
                self.notices.append(f"{self.settings.provider} still has a queue for {each}: {exc}")

    # --- within

    def _check_tables(self) -> None:
        if not self._is_checked:
            see_log(self._database)
            self._is_checked = True

    def _connect(self) -> None:
        if not self._is_connected:
            self._provider.initialize()
            self._is_connected = True

    def _run(self, step: Callable[[Transaction], Any]) -> Any:
        self._check_tables()
        if self.joins_log:
            self._connect()
        return self._database.run(step)

    def _call(self, function: Callable[..., Any], tx: Transaction) -> tuple[Any, list[Delivery]]:
        value, new = function(tx)
        if new and self.joins_log:
            self._provider.publish(new, tx)
        elif new:
            backlog.give_back(tx, new)
        return value, new

    def _append(
        self, envelopes: Sequence[Envelope], tx: Transaction
    ) -> tuple[list[Delivery], dict[str, First]]:
        firsts = dedupe.known(tx, envelopes)
        new = log.append(
            tx,
            [envelope for envelope in envelopes if envelope.id not in firsts],
            self.settings.retries.limit,
            handover=self.handover,
        )
        if self.joins_log and new:
            self._provider.publish(new, tx)
        return new, firsts

    # --- handing over to the provider what is stored

    def _hand_over(self, new: Sequence[Delivery]) -> None:
        """Give the provider what is ready for it; what it does not take, services relay later."""
        if not new:
            return
        try:
            self._connect()
            if self.joins_log:
                self._provider.published(new)
                return
            self._relay({each.seq for each in new})
            # no subscription in the log wants these, so that they are nowhere ready
            self._publish([each for each in new if not each.seq])
        except ProviderError as exc:
            self._is_connected = False
            self.notices.append(
                f"stored, and relayed when {self.settings.provider} takes it: {exc}"
            )

    def relay(self) -> int:
        """Hand over to the provider what is ready for it, up to 500 of each subscription.

        :returns: how many that were; others may have taken some meanwhile.
        :raises ProviderError: when it does not answer.
        """
        self._connect()
        taken: list[Delivery] = self._run(backlog.take)
        self._publish_all(taken)
        return len(taken)

    def _publish_all(self, deliveries: list[Delivery]) -> None:
        """Hand over; what no queue got as a new event goes to its subscription's alone."""
        homeless = self._publish(deliveries)
        lost = [each for each in homeless if each.seq and each.to is None]
        if not lost or not self._provider.capabilities.fans_out:
            return
        strays = self._database.read(partial(backlog.addressed, deliveries=lost))
        for subscription in arrived_at(strays, self._publish(strays)):
            self._provider.rejoin(subscription)

    def _relay(self, wanted: set[int]) -> None:
        deadline = monotonic() + RELAY_SECONDS
        while monotonic() < deadline:
            taken = self._database.run(backlog.take, durable=False)
            self._publish_all(taken)
            wanted -= {each.seq for each in taken}
            if not wanted or not self._database.run(backlog.waits, durable=False):
                return
            if not taken:
                sleep(AGAIN_SECONDS)
        self.notices.append("stored; others are publishing what comes before it")

    def _publish(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Hand over; return those for which there is no queue."""
        if not deliveries:
            return []
        try:
            homeless = self._provider.publish(deliveries)
        except ProviderRefusedError as exc:
            # in hand for as long as any publication may take, and then tried again
            refused = {id(each) for each in exc.refused}
            deliveries = [each for each in deliveries if id(each) not in refused]
            homeless = exc.homeless
            self.notices.append(str(exc))
        except ProviderError:
            self._database.run(partial(backlog.give_back, deliveries=deliveries), durable=False)
            raise
        without = {id(each) for each in homeless}
        done = [each for each in deliveries if id(each) not in without or not each.seq]
        to = self.settings.provider if self.settings.drain else None
        self._database.run(partial(backlog.published, deliveries=done, to=to), durable=False)
        self._provider.published(deliveries)
        return homeless


def _forget(provider: QueueProvider, subscription: Subscription) -> None:
    provider.forget(subscription)


class DirectOperations(Operations):
    """:class:`Operations` for one command."""

    def __init__(self, settings: Settings) -> None:
        self.client: DirectClient = DirectClient(settings)
        self.reader = self.client


class DirectRamps(Ramps):
    """:class:`Ramps` for one command: a service carries them on."""

    def __init__(self, client: DirectClient) -> None:
        self.client = client
        self.reader = client


class DirectAlerts(Alerts):
    """:class:`Alerts` for one command."""

    def __init__(self, client: DirectClient) -> None:
        self.client = client
        self.reader = client


class DirectSchedules(Schedules):
    """:class:`Schedules` for one command: a service dispatches what is due."""

    def __init__(self, client: DirectClient) -> None:
        self.client = client
        self.reader = client
