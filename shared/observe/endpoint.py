"""Where a process tells Prometheus what its services count: ``QUEUE_METRICS_ADDRESS``."""

from __future__ import annotations

import logging
from typing import Any

import eventlet
from eventlet import wsgi
from eventlet.green import socket
from prometheus_client import CollectorRegistry

from shared.observe.counts import ServiceCounts
from shared.observe.metrics import exposed, process_registry
from shared.settings import Address

_log = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0
"""How long to wait before an address that is taken is tried again: whoever this process
replaces may still be there, and to be seen is no condition for handling events."""


class Endpoint:
    """Answers every GET with the metrics of the services that were added.

    One for each process, whatever number of services run in it.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._counted: list[ServiceCounts] = []
        self._registry: CollectorRegistry = process_registry(self._counted)
        self._thread: Any = None
        self._sock: Any = None

    @property
    def port(self) -> int | None:
        """The port that it listens on; ``None`` while it does not."""
        return None if self._sock is None else int(self._sock.getsockname()[1])

    def add(self, counts: ServiceCounts) -> None:
        """Tell what a service counts; listen, if nobody does yet."""
        self._counted.append(counts)
        if self._thread is None:
            self._thread = eventlet.spawn(self._run)

    def remove(self, counts: ServiceCounts) -> None:
        """Tell no more of a service; stop with the last one."""
        if counts in self._counted:
            self._counted.remove(counts)
        if not self._counted and self._thread is not None:
            self._thread.kill()
            self._thread = None

    def _run(self) -> None:
        try:
            self._sock = self._listen()
            wsgi.server(self._sock, self._answer, log_output=False)
        finally:
            if self._sock is not None:
                self._sock.close()
                self._sock = None

    def _listen(self) -> Any:
        host, port = self._address.host, self._address.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        is_said = False
        while True:
            try:
                # shared, a port would answer for one of several processes, at random
                sock = eventlet.listen((host, port), family=family, reuse_port=False)
            except OSError as exc:
                if not is_said:
                    _log.warning("metrics: cannot listen on %s: %s", self._address, exc.strerror)
                is_said = True
                eventlet.sleep(AGAIN_SECONDS)
            else:
                _log.info("metrics on http://%s:%d/metrics", host, sock.getsockname()[1])
                return sock

    def _answer(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start_response("405 Method Not Allowed", [("Allow", "GET, HEAD")])
            return []
        text, content_type = exposed(self._registry, environ.get("HTTP_ACCEPT"))
        start_response("200 OK", [("Content-Type", content_type)])
        return [text]


_endpoints: dict[Address, Endpoint] = {}


def endpoint_at(address: Address) -> Endpoint:
    """Return the endpoint of this process at an address."""
    return _endpoints.setdefault(address, Endpoint(address))
