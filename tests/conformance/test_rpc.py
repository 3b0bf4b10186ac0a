"""What carries RPC, on each provider that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import monotonic

import pytest

from shared.database import database_url, make_reader
from shared.errors import ProviderUnavailableError, UnsupportedByProviderError
from shared.native import Signal
from shared.providers import RpcMessage, RpcTransport, embedded, provider_class
from shared.tables import rpc_messages
from shared.testing.conformance.lab import ProviderLab, elapsed
from tests.support.waiting import wait_until

SERVICE = "rpc-shop"
REPLIES = "rpc.reply-caller-1"


class Party:
    """One process that takes part: its transport."""

    def __init__(self, transport: RpcTransport) -> None:
        self.transport = transport
        self.interrupt = Signal()
        transport.initialize()

    def send(self, *bodies: str, queue: str = SERVICE, ttl: float = 30, mandatory: bool = True):
        messages = [RpcMessage(queue, body, ttl, mandatory) for body in bodies]
        return [message.body for message in self.transport.send(messages)]

    def take(self, limit: int = 100, queue: str = SERVICE) -> list[str]:
        return [message.body for message in self.transport.take({queue: limit})]

    def wait(self, timeout: float, *queues: str) -> None:
        self.transport.wait(timeout, self.interrupt.fileno(), queues)

    def take_within(self, seconds: float, queue: str = SERVICE) -> list[str]:
        """Take what comes, by the transport's own means of waiting."""
        deadline = monotonic() + seconds
        while not (taken := self.take(queue=queue)):
            assert monotonic() < deadline, f"nothing in {queue} within {seconds} s"
            self.wait(deadline - monotonic(), queue)
        return taken

    def close(self) -> None:
        self.transport.close()
        self.interrupt.close()


@pytest.fixture
def new_party(lab: ProviderLab) -> Iterator[Callable[..., Party]]:
    made: list[Party] = []

    def make(*declared: str, lasting: bool = True) -> Party:
        try:
            transport = provider_class(lab.settings).rpc_transport(lab.settings)
        except UnsupportedByProviderError as exc:
            pytest.skip(str(exc))
        made.append(Party(transport))
        for queue in declared:
            transport.declare(queue, lasting=lasting)
        return made[-1]

    yield make
    for party in made:
        party.close()


@pytest.fixture
def callee(new_party: Callable[..., Party]) -> Party:
    return new_party(SERVICE)


@pytest.fixture
def caller(new_party: Callable[..., Party]) -> Party:
    return new_party(REPLIES, lasting=False)


def ttls(messages: Sequence[RpcMessage]) -> list[float]:
    return [message.ttl for message in messages]


class TestSending:
    def test_what_is_sent_is_taken_once_in_order(self, caller, callee):
        assert caller.send("a", "b\nb", "ç \u0001 'c' {}") == []
        assert caller.send("d") == []

        assert callee.take(2) == ["a", "b\nb"]
        assert callee.take() == ["ç \u0001 'c' {}", "d"]
        assert callee.take() == []

    def test_two_takers_share(self, caller, callee, new_party):
        other = new_party(SERVICE)
        caller.send(*map(str, range(10)))

        assert callee.take(4) + other.take(4) + callee.take(4) == list(map(str, range(10)))

    def test_limits_are_by_queue(self, caller, callee):
        callee.transport.declare("rpc-other", lasting=True)
        caller.send("a", "b")
        caller.send("x", "y", queue="rpc-other")

        taken = callee.transport.take({SERVICE: 1, "rpc-other": 2})

        assert [(m.queue, m.body) for m in taken] == [
            (SERVICE, "a"),
            ("rpc-other", "x"),
            ("rpc-other", "y"),
        ]

    def test_a_megabyte(self, caller, callee):
        body = "é" * (1 << 20)
        caller.send(body)
        assert callee.take() == [body]

    def test_nobody_ever_declared_it(self, caller, callee):
        sent = [
            RpcMessage("rpc-nobody", "a", 30, mandatory=True),
            RpcMessage(SERVICE, "b", 30, mandatory=True),
            RpcMessage("rpc.reply-gone", "c", 30),
        ]
        assert caller.transport.send(sent) == sent[:1]
        assert callee.take() == ["b"]

    def test_it_stays_declared(self, caller, callee):
        callee.transport.close()
        assert caller.send("a") == []

    def test_one_that_is_not_lasting_does_not(self, caller, callee):
        assert callee.send("a", queue=REPLIES) == ["a"]


class TestExpiry:
    def test_what_is_taken_has_the_time_that_is_left(self, caller, callee):
        caller.send("a", ttl=20)
        [ttl] = ttls(callee.transport.take({SERVICE: 1}))
        assert 15 < ttl <= 20

    def test_what_is_over_is_never_taken(self, caller, callee):
        caller.send("short", ttl=0.05)
        caller.send("long", ttl=30)

        is_over = monotonic() + 0.1
        wait_until(lambda: monotonic() > is_over, 5, "the first to be over")
        assert callee.take() == ["long"]

    def test_nothing_is_left_behind(self, caller, callee, left_behind, monkeypatch):
        monkeypatch.setattr(embedded, "PURGE_SECONDS", 0.1)
        before = left_behind()
        for n in range(20):
            caller.send(str(n), ttl=0.05)
            callee.send(str(n), queue=REPLIES, ttl=0.05, mandatory=False)

        # nobody takes the replies
        wait_until(lambda: callee.take() == [] and left_behind() == before, 20, "the rest to go")


@pytest.fixture
def left_behind(lab: ProviderLab) -> Iterator[Callable[[], object]]:
    """Says what there is at the server."""
    server = getattr(lab, "server", None)
    nodes = getattr(server, "nodes", [server])
    if hasattr(nodes[0], "client"):
        yield lambda: sorted(key for node in nodes for key in keys(lab, node))
        return
    engine = make_reader(database_url(lab.settings), lambda _: None)

    def rows() -> object:
        with engine.connect() as connection:
            return connection.execute(rpc_messages.select()).all()

    yield rows
    engine.dispose()


def keys(lab, node):
    with node.client(0 if lab.settings.redis_url else lab.settings.redis_db) as client:
        return list(client.scan_iter())


class TestWaking:
    def test_who_waits_is_woken(self, lab, caller, callee):
        for n in range(20):
            with elapsed(at_most=2 * lab.promptly):
                caller.send(f"request {n}")
                assert callee.take_within(5) == [f"request {n}"]
                callee.send(f"reply {n}", queue=REPLIES, mandatory=False)
                assert caller.take_within(5, REPLIES) == [f"reply {n}"]

    def test_not_for_what_it_does_not_want(self, caller, callee):
        caller.send("a")
        with elapsed(at_least=0.25):
            deadline = monotonic() + 0.3
            while (left := deadline - monotonic()) > 0:
                callee.wait(left)

    def test_an_interrupt_ends_the_wait(self, callee):
        callee.interrupt.ring()
        with elapsed(at_most=2):
            callee.wait(10, SERVICE)


class TestServerGone:
    @pytest.fixture(autouse=True)
    def _can_stop(self, lab):
        if not lab.can_stop:
            pytest.skip("there is no server")

    def test_it_says_so_and_goes_on_when_it_is_back(self, lab, caller, callee):
        caller.send("before")
        lab.stop_server()
        try:
            for step in (lambda: caller.send("a"), callee.take, callee.transport.initialize):
                with pytest.raises(ProviderUnavailableError):
                    step()
        finally:
            lab.start_server()
        for party in (caller, callee):
            party.transport.initialize()
        callee.transport.declare(SERVICE, lasting=True)
        caller.send("after")

        assert callee.take()[-1] == "after"
