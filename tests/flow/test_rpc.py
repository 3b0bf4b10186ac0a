"""RPC between processes, on each provider."""

import contextlib
import os
import re
import signal
import socket
import time
from collections import Counter
from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import UUID

import eventlet
import pytest
import requests
from kombu import Connection
from kombu.exceptions import EncodeError
from nameko.containers import ServiceContainer
from nameko.exceptions import (
    IncorrectSignature,
    MalformedRequest,
    MethodNotFound,
    RemoteError,
    UnknownService,
)
from nameko.testing.services import dummy, entrypoint_hook

from shared.database import database_url, make_engine
from shared.errors import PayloadError, ProviderUnavailableError, QueueError, RpcTimeoutError
from shared.providers import RpcMessage, provider_class
from shared.rpc import RpcProxy, RpcReply
from shared.rpc.client import RpcClient
from shared.tables import metadata
from shared.testing.servers import free_port
from tests.flow.apps.callee import TeaError
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

CALLEE = "tests.flow.apps.callee"
PLAIN = "tests.flow.apps.plain_rpc"

REDIS = {"QUEUE_PROVIDER": "redis"}


def on_rabbitmq(server):
    return {
        "QUEUE_PROVIDER": "rabbitmq",
        "RABBITMQ_VHOST": server.new_vhost(),
        **server.environment,
    }


PROVIDERS = {
    "embedded-sqlite": lambda _: {},
    "embedded-mariadb": lambda fixture: fixture("mariadb_log"),
    "redis": lambda fixture: {**REDIS, **fixture("redis_server").environment},
    "rabbitmq": lambda fixture: on_rabbitmq(fixture("rabbitmq_server")),
}

SHARED = {
    **PROVIDERS,
    "embedded-mariadb": lambda fixture: fixture("new_mariadb_log")(),
    "redis": lambda fixture: {**REDIS, **fixture("shared_redis_server").environment},
}
"""The same for what many tests share."""


class Caller:
    name = "caller"

    callee = RpcProxy("callee", timeout=20)
    hasty = RpcProxy("callee", timeout=0.5)
    nobody = RpcProxy("nobody")
    plain = RpcProxy("plain", timeout=20)
    auth = RpcProxy("auth_events", timeout=20)
    company = RpcProxy("company", timeout=20)

    @dummy
    def run(self, function):
        return function(self)


class Calls:
    """A caller within the tests' own process."""

    def __init__(self, flow):
        self.flow = flow
        self.container = ServiceContainer(Caller, {**flow.env, "max_workers": 100})
        self.container.start()

    def run(self, function, **options):
        """Call ``function`` with the service, as a method of it."""
        with entrypoint_hook(self.container, "run", **options) as run:
            return run(function)

    @property
    def are_namekos(self):
        """Whether it is nameko's own RPC that carries them."""
        return RpcClient not in self.container.shared_extensions

    def serve(self, module=CALLEE, **env):
        """Start a process of the callee; return once it can be called."""
        [process] = self.serve_all(module, **env)
        return process

    def serve_all(self, *modules, **env):
        """Start a process of each; return once all can be called."""
        broker = self.container.config.get("AMQP_URI")
        # a module bears its service's name; plain_rpc stands for the service plain
        queues = Counter(f"rpc-{each.rpartition('.')[2].removesuffix('_rpc')}" for each in modules)
        wanted = {queue: self.consumers_of(queue) + count for queue, count in queues.items()}
        processes = []
        for module in modules:
            arguments = ("--broker", broker) if module == PLAIN else ()
            processes.append(self.flow.run(module, wait=False, arguments=arguments, **env))
        wait_until(
            lambda: (
                all(self.consumers_of(queue) >= count for queue, count in wanted.items())
                if self.are_namekos
                else all("rpc ready" in process.output() for process in processes)
            ),
            20,
            lambda: "\n".join(process.output() for process in processes),
            # each look at RabbitMQ is a connection
            every=0.05,
        )
        return processes

    def consumers_of(self, queue):
        """Ask RabbitMQ, since nameko does not say when it is ready."""
        if not self.are_namekos:
            return 0
        with Connection(self.container.config["AMQP_URI"]) as connection:
            try:
                return connection.default_channel.queue_declare(queue, passive=True).consumer_count
            except connection.channel_errors:
                return 0


@pytest.fixture(scope="module", params=PROVIDERS)
def provider(request):
    return request.param


@pytest.fixture
def calls(provider, request, flow_on):
    flow = flow_on(PROVIDERS[provider](request.getfixturevalue))
    made = Calls(flow)
    assert made.are_namekos == (provider == "rabbitmq")
    yield made
    made.container.stop()
    flow.close()
    if provider == "redis":
        request.getfixturevalue("redis_server").empty()


@pytest.fixture
def not_namekos(provider):
    """For what nameko's own RPC does in another way, or cannot be asked."""
    if provider == "rabbitmq":
        pytest.skip("over RabbitMQ it is nameko's own RPC")


@pytest.fixture(scope="module")
def served(provider, request, shared_flow_on):
    """A callee that nobody kills, and who calls it."""
    made = Calls(shared_flow_on(SHARED[provider](request.getfixturevalue)))
    made.callee = made.serve()
    yield made
    made.container.stop()
    made.flow.close()
    if provider == "redis":
        request.getfixturevalue("shared_redis_server").empty()


def said_from_now(process):
    """Return what asks for what a process says from now on."""
    before = len(process.output())
    return lambda: process.output()[before:]


class TestResult:
    def test_it_is_what_the_method_returned(self, served):
        assert served.run(lambda s: s.callee.echo()) == [[], {}]
        assert served.run(lambda s: s.callee.echo(1, "é", a=None)) == [[1, "é"], {"a": None}]
        assert served.run(lambda s: s.callee.add(40)) == 42
        assert served.run(lambda s: s.callee.add(b=1, a="x" * 3 and 2)) == 3

    def test_what_is_no_json_travels_as_over_rabbitmq(self, served):
        given = [
            datetime(2026, 3, 1, 12, 30, tzinfo=UTC),
            date(2026, 3, 1),
            Decimal("1.10"),
            UUID("71d4d61a-c51c-491f-bbe9-db79c23ca89c"),
            b"\xff\x00",
            "half a character \ud800, none \x00",
        ]
        assert served.run(lambda s: s.callee.echo(*given)) == [given, {}]

    def test_several_in_flight(self, served):
        def in_flight(s):
            slow = s.callee.sleep.call_async(0.5, n=1)
            replies = [s.callee.echo.call_async(n) for n in range(20)]
            assert [reply.result()[0] for reply in reversed(replies)] == [
                [n] for n in reversed(range(20))
            ]
            # once more, since it is there
            assert replies[3].result() == [[3], {}]
            return slow.result()

        assert served.run(in_flight) == 1

    def test_more_than_there_are_workers(self, served):
        def many(s):
            replies = [s.callee.sleep.call_async(0.05, n=n) for n in range(50)]
            return [reply.result() for reply in replies]

        assert served.run(many) == list(range(50))

    def test_a_round_trip_takes_milliseconds(self, served):
        def median(s):
            times = []
            for _ in range(50):
                start = time.perf_counter()
                s.callee.echo()
                times.append(time.perf_counter() - start)
                eventlet.sleep(0.002)
            return sorted(times)[25]

        # idle it is 2 ms; with room for a machine that is not, and less than any poll takes
        assert served.run(median) < 0.2


class TestErrors:
    def test_what_the_method_raised(self, served):
        with pytest.raises(RemoteError) as raised:
            served.run(lambda s: s.callee.fail("told to", 7))
        assert (raised.value.exc_type, raised.value.value) == ("ValueError", "('told to', 7)")

    def test_what_is_registered_is_raised_as_it_is(self, served):
        with pytest.raises(TeaError) as raised:
            served.run(lambda s: s.callee.run_out())
        assert raised.value.args == ("no tea", "3")

    def test_an_expected_one_is_a_warning_there(self, served):
        said = said_from_now(served.callee)
        with pytest.raises(RemoteError, match="KeyError"):
            served.run(lambda s: s.callee.expect("k"))
        with pytest.raises(RemoteError, match="ValueError"):
            served.run(lambda s: s.callee.fail())
        wait_until(lambda: said().count("error handling worker") == 2, 5, "the log")
        assert said().count("(expected) error handling worker") == 1

    def test_of_the_call(self, served):
        with pytest.raises(MethodNotFound, match="no_such"):
            served.run(lambda s: s.callee.no_such())
        with pytest.raises(IncorrectSignature):
            served.run(lambda s: s.callee.add())
        with pytest.raises(RemoteError, match="UnserializableValueError"):
            served.run(lambda s: s.callee.unserializable())
        with pytest.raises(UnknownService, match="nobody"):
            served.run(lambda s: s.nobody.method.call_async())
        with pytest.raises(EncodeError):
            served.run(lambda s: s.callee.echo(object()))
        # and it goes on
        assert served.run(lambda s: s.callee.add(1)) == 3

    def test_too_large(self, not_namekos, served):
        most = served.flow.settings.max_payload_bytes
        with pytest.raises(PayloadError, match="arguments: too large"):
            served.run(lambda s: s.callee.echo("x" * most))
        with pytest.raises(RemoteError, match="PayloadError result: too large"):
            served.run(lambda s: s.callee.large(most))
        with pytest.raises(RemoteError, match=r"ValueError x{1000}$"):
            served.run(lambda s: s.callee.fail("x" * (most - 1000)))
        assert len(served.run(lambda s: s.callee.large(most - 1000))) == most - 1000

    def test_too_large_are_none_of_namekos_own(self, served):
        if not served.are_namekos:
            pytest.skip("there QUEUE_MAX_PAYLOAD_BYTES is the limit")
        more = served.flow.settings.max_payload_bytes + 100_000
        assert served.run(lambda s: s.callee.echo("x" * more)) == [["x" * more], {}]

    def test_a_request_without_arguments(self, not_namekos, served):
        """Given a request that another release sent, or a stranger."""
        client = next(iter(served.container.shared_extensions.values()))

        def malformed(service):
            deadline = time.monotonic() + 20
            event = client.call("callee", "echo", {"args": []}, deadline)
            return RpcReply(event, service.callee.echo, deadline, 20).result()

        with pytest.raises(MalformedRequest, match="kwargs"):
            served.run(malformed)

    def test_a_request_that_is_none(self, not_namekos, served):
        said = said_from_now(served.callee)
        send(served, "no JSON", "[]", '{"method": "echo"}')
        wait_until(lambda: said().count("a request was dropped") == 3, 10, "the log")
        assert served.run(lambda s: s.callee.add(1)) == 3


def send(calls, *bodies):
    """Send requests past the client."""
    settings = calls.flow.settings
    transport = provider_class(settings).rpc_transport(settings)
    transport.initialize()
    transport.send([RpcMessage("rpc-callee", body, 30) for body in bodies])
    transport.close()


class TestTimeout:
    def test_a_callee_that_is_slow(self, served):
        start = time.monotonic()
        with pytest.raises(RpcTimeoutError, match=re.escape("callee.sleep: no reply in 0.5 s")):
            served.run(lambda s: s.hasty.sleep(3))
        assert 0.5 <= time.monotonic() - start < 3
        assert issubclass(RpcTimeoutError, QueueError)
        # the reply that comes too late harms nobody
        assert served.run(lambda s: s.hasty.add(1)) == 3

    def test_it_counts_from_the_call(self, served):
        def call_and_wait(s):
            reply = s.hasty.sleep.call_async(2)
            eventlet.sleep(0.5)
            start = time.monotonic()
            for _ in range(2):
                with pytest.raises(RpcTimeoutError):
                    reply.result()
            return time.monotonic() - start

        assert served.run(call_and_wait) < 0.4

    def test_a_callee_that_was_killed(self, calls):
        process = calls.serve()

        def call_and_kill(s):
            reply = s.callee.sleep.call_async(60, n=7)
            hasty = s.hasty.sleep.call_async(60, n=8)
            calls.flow.effects.wait_for(2)
            process.kill()
            with pytest.raises(RpcTimeoutError):
                hasty.result()
            return reply

        calls.run(call_and_kill)

    def test_a_callee_that_is_not_there(self, not_namekos, calls):
        calls.serve().kill()
        with pytest.raises(RpcTimeoutError):
            calls.run(lambda s: s.hasty.sleep(0, n=1))

        # it comes back; who called has given up, and is not served
        calls.serve()
        assert calls.run(lambda s: s.callee.sleep(0, n=2)) == 2
        assert {effect["n"] for effect in calls.flow.effects.all()} == {2}

    def test_a_callee_that_comes_back_in_time(self, calls):
        calls.serve().kill()

        def call_and_start(s):
            reply = s.callee.add.call_async(1)
            calls.serve()
            return reply.result()

        assert calls.run(call_and_start) == 3

    def test_a_callee_whose_hub_is_busy(self, served):
        with pytest.raises(RpcTimeoutError):
            served.run(lambda s: s.hasty.burn(1.5))
        assert served.run(lambda s: s.callee.add(1)) == 3


class TestContext:
    def test_the_call_stack_travels(self, served):
        stack = served.run(lambda s: s.callee.stack_of_callee())
        assert [".".join(call.split(".")[:2]) for call in stack] == [
            "caller.run",
            "callee.stack_of_callee",
            "callee.stack",
        ]

    def test_so_does_other_context_data(self, served):
        context = {"language": "ta", "user": {"id": 7}}
        data = served.run(lambda s: s.callee.data(), context_data=context)
        assert context.items() <= data.items()


class TestInstances:
    def test_two_share_the_load(self, calls):
        pids = {process.pid for process in calls.serve_all(CALLEE, CALLEE)}

        def many(s):
            replies = [s.callee.pid.call_async(n) for n in range(60)]
            return [reply.result() for reply in replies]

        done_by = calls.run(many)

        assert set(done_by) == pids
        assert min(done_by.count(pid) for pid in pids) >= 10
        assert sorted(effect["n"] for effect in calls.flow.effects.all()) == list(range(60))

    def test_one_that_stops_finishes_and_hands_back(self, not_namekos, calls):
        first = calls.serve()

        def call_and_stop(s):
            # ten of them run, and as many more wait
            replies = [s.callee.sleep.call_async(1, n=n) for n in range(20)]
            calls.flow.effects.wait_for(10)
            calls.serve()
            assert first.terminate() == 0
            return [reply.result() for reply in replies]

        assert calls.run(call_and_stop) == list(range(20))
        ran = [effect["n"] for effect in calls.flow.effects.all(what="done")]
        assert sorted(ran) == list(range(20))

    def test_one_that_does_not_end_in_time_is_ended(self, not_namekos, calls):
        process = calls.serve(QUEUE_GRACE_SECONDS="0.5")

        def call_and_stop(s):
            reply = s.hasty.sleep.call_async(60)
            calls.flow.effects.wait_for(1)
            os.kill(process.pid, signal.SIGTERM)
            assert process.process.wait(10) == 0
            with pytest.raises(RpcTimeoutError):
                reply.result()

        calls.run(call_and_stop)


class TestNothingIsLeft:
    def test_after_a_thousand_calls(self, request, not_namekos, calls):
        calls.serve()
        calls.flow.container  # noqa: B018 - its log has tables from now on
        before = leftovers(calls, request)

        def thousand(s):
            for _ in range(20):
                replies = [s.callee.add.call_async(n) for n in range(49)]
                replies += [s.callee.fail.call_async()]
                for reply in replies[:-1]:
                    reply.result()
                with pytest.raises(RemoteError):
                    replies[-1].result()

        calls.run(thousand)

        assert leftovers(calls, request) == before
        assert calls.flow.stats() == {}


def leftovers(calls, request):
    """Everything that there is in the log's tables, and at the server."""
    engine = make_engine(database_url(calls.flow.settings), time.sleep)
    with engine.connect() as connection:
        known = [t for t in metadata.sorted_tables if engine.dialect.has_table(connection, t.name)]
        found = {t.name: connection.execute(t.select()).all() for t in known}
    engine.dispose()
    if calls.flow.settings.provider != "embedded":
        with request.getfixturevalue("redis_server").client(1) as client:
            found["redis"] = sorted(client.scan_iter())
    return found


class TestPlainNameko:
    @pytest.fixture(autouse=True)
    def _over_amqp(self, provider):
        if provider != "rabbitmq":
            pytest.skip("it has no such transport")

    def test_calls_and_is_called(self, served):
        served.serve(PLAIN)

        assert served.run(lambda s: s.plain.echo(1, a="é")) == [[1], {"a": "é"}]
        assert served.run(lambda s: s.plain.call_back(40)) == 42
        with pytest.raises(RemoteError, match="ValueError plainly"):
            served.run(lambda s: s.plain.fail())

    def test_what_runs_when_its_process_is_killed_is_run_again(self, calls):
        process = calls.serve()

        def call_and_kill(s):
            reply = s.callee.sleep.call_async(1, n=7)
            calls.flow.effects.wait_for(1)
            process.kill()
            calls.serve()
            return reply.result()

        assert calls.run(call_and_kill) == 7
        assert len(calls.flow.effects.all(n=7, what="began")) == 2


class TestServices:
    # on MariaDB their tables would have to be made first
    @pytest.mark.parametrize("provider", ["embedded-sqlite", "redis", "rabbitmq"], indirect=True)
    def test_can_be_asked(self, calls):
        address = f"127.0.0.1:{free_port()}"
        calls.serve_all(
            "services.company",
            "services.auth_events",
            COMPANY_ADDRESS=f"127.0.0.1:{free_port()}",
            AUTH_EVENTS_ADDRESS=address,
        )
        wait_until(lambda: is_open(address), 20, "auth_events to serve HTTP")
        for step in ("register", "login"):
            url = f"http://{address}/auth/{step}"
            answer = requests.post(url, json=self.given(step), timeout=20).json()

        session = calls.run(lambda s: s.auth.get_session(answer["access_token"]))
        assert (session["user_id"], session["email"]) == (answer["user_id"], "ada@example.com")
        assert calls.run(lambda s: s.auth.get_session("no token")) is None
        wait_until(
            lambda: calls.run(lambda s: s.company.get_user(answer["user_id"])) is not None,
            20,
            "company to have heard of the user",
        )
        [user] = calls.run(lambda s: s.company.list_users(limit=1))
        assert user["user_id"] == answer["user_id"]
        with pytest.raises(RemoteError, match="ValueError limit: must be 1 to 1000"):
            calls.run(lambda s: s.company.list_users(limit=0))
        assert calls.run(lambda s: s.company.get_user("nobody")) is None

    @staticmethod
    def given(step):
        person = {"email": "ada@example.com", "password": "difference engine"}
        return person if step == "login" else {**person, "first_name": "A", "last_name": "L"}


def is_open(address):
    host, port = address.split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
        return True
    return False


class TestServerGone:
    def test_calls_go_on_when_it_is_back(self, flow_on, redis_server):
        calls = Calls(flow_on({**REDIS, **redis_server.environment}))
        process = calls.serve()
        assert calls.run(lambda s: s.callee.add(1)) == 3

        redis_server.stop()
        try:
            with pytest.raises(ProviderUnavailableError):
                calls.run(lambda s: s.callee.add(1))
        finally:
            redis_server.start()

        wait_until(lambda: "reachable again" in process.output(), 20, process.output)
        wait_until(lambda: succeeds(calls), 20, "a call to succeed")
        # what it knew is gone as well
        redis_server.empty()
        wait_until(lambda: succeeds(calls), 20, "a call to succeed")
        calls.container.stop()
        redis_server.empty()


def succeeds(calls):
    try:
        return calls.run(lambda s: s.callee.add(1)) == 3
    except (ProviderUnavailableError, UnknownService):
        return False
