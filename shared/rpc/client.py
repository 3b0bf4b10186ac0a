"""A service's own end of RPC: shared by all its methods and proxies."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from time import monotonic
from typing import Any
from weakref import WeakValueDictionary

import eventlet
from eventlet.event import Event
from eventlet.queue import LightQueue
from nameko.exceptions import MalformedRequest, MethodNotFound, UnknownService
from nameko.extensions import SharedExtension
from nameko.rpc import RPC_REPLY_QUEUE_TEMPLATE

from shared.errors import UnsupportedByProviderError
from shared.native import Mailbox, Promise, Thread
from shared.providers import RpcMessage, provider_class
from shared.rpc import messages
from shared.rpc.carrier import Carrier, Finish, Free, Join, RefusedError, Send, StopServing
from shared.rpc.messages import Request
from shared.settings import Settings, settings_or_exit
from shared.stopping import stopper

_log = logging.getLogger(__name__)

START_SECONDS = 5.0
"""How long a start waits until the service can be called; it goes on in the background."""

FINISH_SECONDS = 10.0
"""How long a stop waits for the last replies to be sent."""


class RpcClient(SharedExtension):
    """Starts and stops the carrier, has requests handled, and gives replies to who waits.

    One for each service container. To nameko's ``Rpc`` it is what an ``RpcConsumer`` is.
    """

    settings: Settings

    def __init__(self) -> None:
        # filled by the set-ups of the methods, which run in no order
        self._methods: dict[str, Any] = {}
        self._waiting: WeakValueDictionary[str, Event] = WeakValueDictionary()
        self._thread: Thread | None = None
        self._grace: Any = None
        self.is_stopping = False
        self._is_stopped = False

    def bind(self, container: Any) -> Any:
        instance = super().bind(container)
        # read while the container is made: the process can still end with a status
        instance.settings = settings_or_exit(container.config)
        return instance

    def setup(self) -> None:
        name = self.container.service_name
        self.reply_queue = RPC_REPLY_QUEUE_TEMPLATE.format(name, uuid.uuid4())
        try:
            transport = provider_class(self.settings).rpc_transport(self.settings)
        except UnsupportedByProviderError as exc:
            _log.warning("%s: nobody can be called: %s", name, exc)
            return
        self._inbox: Any = LightQueue()
        self._mailbox = Mailbox()
        carrier = Carrier(
            self.settings, transport, self._mailbox, self._on_messages, _log.log, self._crash
        )
        self._thread = Thread(carrier.run, "rpc-carrier")

    def start(self) -> None:
        if self._thread is None:
            return
        self._mailbox.open()
        self._thread.start()
        stopper.add(self._mailbox.rouse)
        self._server = self.container.spawn_managed_thread(self._serve_all, identifier="rpc-client")
        self._join()

    def stop(self) -> None:
        if self._thread is None:
            return
        if self._is_stopped:
            # whoever stops everything once more must not end it sooner
            self._thread.join(FINISH_SECONDS)
            return
        self._is_stopped = True
        if self._grace is not None:
            self._grace.cancel()
        self._mailbox.send(Finish())
        if not self._thread.join(FINISH_SECONDS):
            _log.error("the last replies could not be sent in %s s", FINISH_SECONDS)
            return
        self._server.kill()
        stopper.remove(self._mailbox.rouse)
        self._mailbox.close()

    def kill(self) -> None:
        self.stop()

    # --- for methods, as nameko's Rpc calls them

    def register_provider(self, entrypoint: Any) -> None:
        """Have ``entrypoint`` get the requests for its method."""
        self._methods[entrypoint.method_name] = entrypoint

    def unregister_provider(self, _entrypoint: Any) -> None:
        """Take no more requests; what runs may finish within the grace time."""
        if self._thread is None:
            return
        if not self.is_stopping:
            self.is_stopping = True
            self._mailbox.send(StopServing())
            self._grace = eventlet.spawn_after(self.settings.grace, self._end_running)
        while self._inbox.qsize():
            self.requeue_message(self._inbox.get())

    def handle_result(self, request: Request, result: Any, exc_info: Any) -> tuple[Any, Any]:
        """Send the reply; return what the method's result is taken to be."""
        self._mailbox.send(Free())
        error = exc_info[1] if exc_info is not None else None
        most_bytes = self.settings.max_payload_bytes
        content, wrong = messages.reply_content(result, error, most_bytes)
        body = messages.reply_body(request.correlation_id, content)
        self._mailbox.send(Send(request.reply_to, body, request.deadline))
        if wrong is not None:
            return None, (type(wrong), wrong, wrong.__traceback__)
        return result, exc_info

    def requeue_message(self, request: Request) -> None:
        """Give a request that nobody began to the next instance."""
        self._mailbox.send(Free())
        self._mailbox.send(Send(request.message.queue, request.message.body, request.deadline))

    # --- for proxies

    def call(self, service: str, method: str, content: dict[str, Any], deadline: float) -> Event:
        """Send a request, and return an event that its reply fulfils.

        :param content: ``args``, ``kwargs`` and ``headers``.
        :param deadline: a monotonic time, after which nobody waits for the reply.
        :raises UnknownService: when no instance of the service ever started.
        :raises ProviderError: when it could not be sent.
        :raises PayloadError: when it is too large.
        """
        if self._thread is None:
            raise UnsupportedByProviderError(f"{self.settings.provider} carries no RPC")
        correlation_id, reply_event = str(uuid.uuid4()), Event()
        most_bytes = self.settings.max_payload_bytes
        body = messages.request_body(correlation_id, self.reply_queue, method, content, most_bytes)
        self._waiting[correlation_id] = reply_event
        sent = Promise()
        self._mailbox.send(Send(messages.queue_of(service), body, deadline, sent))
        try:
            sent.wait()
        except RefusedError as exc:
            raise UnknownService(service) from exc
        return reply_event

    # --- within

    def _join(self) -> None:
        ready = Promise()

        def on_joined() -> None:
            self._say_ready()
            ready.resolve(None)

        queue = messages.queue_of(self.container.service_name) if self._methods else None
        self._mailbox.send(Join(queue, self.reply_queue, self.container.max_workers, on_joined))
        with eventlet.Timeout(START_SECONDS, False):
            ready.wait()
            return
        _log.warning("the provider does not answer yet; RPC begins when it does")

    def _say_ready(self) -> None:
        _log.info(
            "%s: rpc ready provider=%s methods=%d",
            self.container.service_name,
            self.settings.provider,
            len(self._methods),
        )

    def _on_messages(self, taken: Sequence[RpcMessage]) -> None:
        for message in taken:
            if message.queue == self.reply_queue:
                self._on_reply(message)
            else:
                self._on_request(message)

    def _on_reply(self, message: RpcMessage) -> None:
        correlation_id, content = messages.read_reply(message)
        reply_event = self._waiting.pop(correlation_id, None)
        if reply_event is not None:  # else its caller has given up
            reply_event.send(content)

    def _on_request(self, message: RpcMessage) -> None:
        try:
            self._inbox.put(Request.of(message))
        except MalformedRequest as exc:
            _log.error("%s: a request was dropped: %s", self.container.service_name, exc)
            self._mailbox.send(Free())

    def _serve_all(self) -> None:
        while True:
            self._serve(self._inbox.get())

    def _serve(self, request: Request) -> None:
        if self.is_stopping:
            self.requeue_message(request)
            return
        if request.deadline <= monotonic():
            self._mailbox.send(Free())
            return
        try:
            self._entrypoint_of(request).handle_message(request.read(), request)
        except Exception:
            self.handle_result(request, None, sys.exc_info())

    def _entrypoint_of(self, request: Request) -> Any:
        try:
            return self._methods[request.method]
        except KeyError:
            raise MethodNotFound(request.method) from None

    def _end_running(self) -> None:
        """Grace time is over: end what still runs; its callers run into their timeout."""
        for worker_ctx, greenthread in list(self.container._worker_threads.items()):
            if worker_ctx.entrypoint in self._methods.values():
                _log.warning("grace time over: %s is ended", worker_ctx.call_id)
                greenthread.kill()

    def _crash(self, error: BaseException) -> None:
        _log.critical("the thread of RPC ended", exc_info=error)
        # in a greenthread of its own: killing ends the one that brings us this
        eventlet.spawn_n(self.container.kill, (type(error), error, error.__traceback__))
