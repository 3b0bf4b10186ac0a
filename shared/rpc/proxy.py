"""The dependency that calls: a drop-in for nameko's ``RpcProxy``, with a timeout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any
from weakref import WeakValueDictionary

import eventlet
from nameko.messaging import HeaderEncoder
from nameko.rpc import MethodProxy as NamekoMethodProxy
from nameko.rpc import ReplyListener
from nameko.rpc import RpcProxy as NamekoRpcProxy
from nameko.rpc import RpcReply as NamekoRpcReply
from nameko.rpc import ServiceProxy as NamekoServiceProxy

from shared.errors import RpcTimeoutError
from shared.rpc.client import RpcClient
from shared.rpc.entrypoint import is_namekos_own

TIMEOUT_SECONDS = 30.0
"""How long a call waits where nobody said; whoever waits on HTTP for us gives up about then."""


class RpcProxy(NamekoRpcProxy):
    """Injects a proxy of another service; what is called on it runs there.

    Takes what ``nameko.rpc.RpcProxy`` takes, and:

    :param timeout: seconds from a call until its reply, after which
        :class:`~shared.errors.RpcTimeoutError` is raised.

    Example::

        class Shop:
            name = "shop"
            company = RpcProxy("company", timeout=5)

            @rpc
            def sell(self, user_id):
                user = self.company.get_user(user_id)

                first = self.company.get_user.call_async(user_id)
                second = self.company.get_user.call_async(user_id)
                return first.result(), second.result()
    """

    rpc_reply_listener = RpcClient()

    def __init__(
        self, target_service: str, *, timeout: float = TIMEOUT_SECONDS, **options: Any
    ) -> None:
        if not timeout > 0:
            raise ValueError("timeout: must be more than 0 seconds")
        self.timeout = timeout
        super().__init__(target_service, **options)

    def bind(self, container: Any, attr_name: str) -> Any:
        if not is_namekos_own(container):
            return super().bind(container, attr_name)
        self.attr_name = attr_name
        over_amqp = AmqpRpcProxy(self.target_service, self.timeout, **self.options)
        return over_amqp.bind(container, attr_name)

    def get_dependency(self, worker_ctx: Any) -> ServiceProxy:
        def method_proxy(name: str) -> MethodProxy:
            return MethodProxy(
                worker_ctx, self.target_service, name, self.rpc_reply_listener, self.timeout
            )

        return ServiceProxy(
            worker_ctx, self.target_service, self.rpc_reply_listener, make=method_proxy
        )


class AmqpReplyListener(ReplyListener):
    """nameko's own, which forgets those who gave up waiting."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._reply_events: Any = WeakValueDictionary()


class AmqpRpcProxy(NamekoRpcProxy):
    """nameko's own, whose calls end with their timeout."""

    rpc_reply_listener = AmqpReplyListener()

    def __init__(self, target_service: str, timeout: float, **options: Any) -> None:
        self.timeout = timeout
        super().__init__(target_service, **options)

    def get_dependency(self, worker_ctx: Any) -> ServiceProxy:
        def method_proxy(name: str) -> AmqpMethodProxy:
            return AmqpMethodProxy(
                worker_ctx,
                self.target_service,
                name,
                self.rpc_reply_listener,
                timeout=self.timeout,
                **self.options,
            )

        return ServiceProxy(
            worker_ctx, self.target_service, self.rpc_reply_listener, make=method_proxy
        )


class ServiceProxy(NamekoServiceProxy):
    """The other service: each attribute is one of its methods."""

    def __init__(self, *args: Any, make: Callable[[str], Any]) -> None:
        super().__init__(*args)
        self._make = make

    def __getattr__(self, name: str) -> Any:
        return self._make(name)


class RpcReply(NamekoRpcReply):
    """A reply that may not have come yet.

    :param deadline: a monotonic time.
    """

    def __init__(self, reply_event: Any, method: Any, deadline: float, timeout: float) -> None:
        super().__init__(reply_event)
        self._method = method
        self._deadline = deadline
        self._timeout = timeout

    def result(self) -> Any:
        """Wait for the reply, and return what the method returned.

        :raises RpcTimeoutError: when it did not come in time.
        :raises RemoteError: when the method raised; what is registered with nameko's
            ``deserialize_to_instance`` is raised as what it is.
        """
        if self.resp_body is None and not self.reply_event.ready():
            with _ends_by(self._deadline, self._method, self._timeout):
                self.reply_event.wait()
        return super().result()


class MethodProxy(HeaderEncoder):
    """A method of the other service."""

    def __init__(
        self,
        worker_ctx: Any,
        service_name: str,
        method_name: str,
        client: RpcClient,
        timeout: float,
    ) -> None:
        self.worker_ctx = worker_ctx
        self.service_name = service_name
        self.method_name = method_name
        self._client = client
        self._timeout = timeout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, and return what it returned; see :meth:`RpcReply.result`."""
        return self.call_async(*args, **kwargs).result()

    def call_async(self, *args: Any, **kwargs: Any) -> RpcReply:
        """Call it, and return as soon as the request is sent.

        :raises UnknownService: when no instance of the service ever started.
        :raises ProviderError: when it could not be sent.
        """
        headers = self.get_message_headers(self.worker_ctx)
        content = {"args": args, "kwargs": kwargs, "headers": headers}
        deadline = monotonic() + self._timeout
        with _ends_by(deadline, self, self._timeout):
            event = self._client.call(self.service_name, self.method_name, content, deadline)
        return RpcReply(event, self, deadline, self._timeout)

    def __repr__(self) -> str:
        return f"<proxy method: {self.service_name}.{self.method_name}>"


class AmqpMethodProxy(NamekoMethodProxy):
    """nameko's own, whose calls end with their timeout."""

    def __init__(self, *args: Any, timeout: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timeout = timeout

    def _call(self, *args: Any, **kwargs: Any) -> RpcReply:
        deadline = monotonic() + self._timeout
        with _ends_by(deadline, self, self._timeout):
            reply = super()._call(*args, **kwargs)
        return RpcReply(reply.reply_event, self, deadline, self._timeout)


@contextmanager
def _ends_by(deadline: float, method: Any, timeout: float) -> Iterator[None]:
    name = f"{method.service_name}.{method.method_name}"
    error = RpcTimeoutError(f"{name}: no reply in {timeout:g} s")
    with eventlet.Timeout(max(deadline - monotonic(), 0), error):
        yield
