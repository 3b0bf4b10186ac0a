"""RPC without a server: what is bound to what, and what a test of a service sees."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import nameko.rpc
import pytest
from nameko.containers import ServiceContainer
from nameko.testing.services import entrypoint_hook, worker_factory

import shared.rpc
from shared.errors import UnsupportedByProviderError
from shared.providers import QueueProvider
from shared.providers.embedded import EmbeddedProvider
from shared.rpc import RpcProxy, messages, rpc
from shared.rpc.client import RpcClient
from shared.rpc.proxy import AmqpRpcProxy


class Without(EmbeddedProvider):
    """Carries no RPC."""

    rpc_transport = QueueProvider.__dict__["rpc_transport"]


class Shop:
    name = "shop"

    company = RpcProxy("company", timeout=3)

    @rpc(expected_exceptions=ValueError, sensitive_arguments="card")
    def sell(self, user_id: str, card: str = "") -> str:
        return f"sold to {self.company.get_user(user_id)['name']}"

    @rpc
    def close(self) -> str:
        return "closed"


def container(config: Mapping[str, str], provider: str = "embedded", **more: str) -> Any:
    return ServiceContainer(Shop, {**config, "QUEUE_PROVIDER": provider, **more})


@pytest.fixture
def running(sqlite_log: Mapping[str, str]) -> Iterator[Any]:
    made = container(sqlite_log)
    made.start()
    yield made
    made.stop()


def test_all() -> None:
    assert shared.rpc.__all__ == [
        "IncorrectSignature",
        "MalformedRequest",
        "MethodNotFound",
        "RemoteError",
        "Rpc",
        "RpcProxy",
        "RpcReply",
        "RpcTimeoutError",
        "UnknownService",
        "UnserializableValueError",
        "rpc",
    ]


class TestOverRabbitMQ:
    def test_methods_are_namekos_own(self, sqlite_log: Mapping[str, str]) -> None:
        made = container(sqlite_log, "rabbitmq")
        assert {type(each) for each in made.entrypoints} == {nameko.rpc.Rpc}
        assert {each.method_name for each in made.entrypoints} == {"sell", "close"}
        sell = next(each for each in made.entrypoints if each.method_name == "sell")
        assert sell.expected_exceptions is ValueError
        assert sell.sensitive_arguments == "card"

    def test_proxies_are_namekos_own_with_a_timeout(self, sqlite_log: Mapping[str, str]) -> None:
        (proxy,) = container(sqlite_log, "rabbitmq").dependencies
        assert type(proxy) is AmqpRpcProxy
        assert isinstance(proxy, nameko.rpc.RpcProxy)
        assert (proxy.target_service, proxy.timeout, proxy.attr_name) == ("company", 3, "company")

    def test_no_carrier_is_made(self, sqlite_log: Mapping[str, str]) -> None:
        made = container(sqlite_log, "rabbitmq")
        assert RpcClient not in made.shared_extensions
        assert nameko.rpc.RpcConsumer in made.shared_extensions

    @pytest.mark.parametrize(
        ("more", "uri"),
        [
            ({}, "amqp://guest:guest@127.0.0.1:5672/%2F"),
            (
                {"AMQP_URI": "pyamqp://guest:guest@localhost"},
                "amqp://guest:guest@127.0.0.1:5672/%2F",
            ),
            ({"AMQP_URI": "amqp://elsewhere"}, "amqp://elsewhere"),
        ],
    )
    def test_nameko_is_told_which_broker(
        self, sqlite_log: Mapping[str, str], more: Mapping[str, str], uri: str
    ) -> None:
        assert container(sqlite_log, "rabbitmq", **more).config["AMQP_URI"] == uri


class TestElsewhere:
    def test_nothing_is_of_amqp(self, sqlite_log: Mapping[str, str]) -> None:
        made = container(sqlite_log)
        assert set(made.shared_extensions) == {RpcClient}
        assert all(isinstance(each, nameko.rpc.Rpc) for each in made.entrypoints)

    def test_a_provider_without_rpc_says_so(
        self, sqlite_log: Mapping[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        made = container(sqlite_log, f"{__name__}:Without")
        made.start()
        with pytest.raises(UnsupportedByProviderError), entrypoint_hook(made, "sell") as sell:
            sell("u1")
        made.stop()
        assert "shop: nobody can be called" in caplog.text


class TestService:
    def test_is_tested_by_a_worker_factory(self) -> None:
        shop = worker_factory(Shop)
        shop.company.get_user.return_value = {"name": "Ada"}
        assert shop.sell("u1") == "sold to Ada"
        shop.company.get_user.assert_called_once_with("u1")

    def test_is_tested_by_an_entrypoint_hook(self, running: Any) -> None:
        with entrypoint_hook(running, "close") as close:
            assert close() == "closed"


class TestArguments:
    @pytest.mark.parametrize("timeout", [0, -1, float("nan")])
    def test_timeout(self, timeout: float) -> None:
        with pytest.raises(ValueError, match="timeout: must be more than 0 seconds"):
            RpcProxy("company", timeout=timeout)

    def test_are_namekos_and_the_timeout(self) -> None:
        ours, its = (
            list(inspect.signature(each.__init__).parameters)
            for each in (RpcProxy, nameko.rpc.RpcProxy)
        )
        assert [name for name in ours if name != "timeout"] == its


class TestReply:
    def test_an_error_as_large_as_a_reply_may_be_is_shortened(self) -> None:
        content, wrong = messages.reply_content(None, ValueError("x" * 5000), 3000)
        assert wrong is None
        assert len(content) < 3000
        assert "ValueError" in content

    def test_what_cannot_be_told(self) -> None:
        content, wrong = messages.reply_content(object(), None, 3000)
        assert "UnserializableValueError" in content
        assert type(wrong).__name__ == "UnserializableValueError"
