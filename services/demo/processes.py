"""The four services, each a ``nameko run`` process of its own, and what they share."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml  # type: ignore[import-untyped]
from nameko.cli.main import setup_yaml_parser

from shared.settings import Address

SERVICES = ("auth_events", "company", "notifications", "queue_admin")

CONFIG = Path(__file__).parents[2] / "config.yml"

NAMEKO = Path(sys.executable).with_name("nameko")

HOST = "127.0.0.1"

START_SECONDS = 60.0
"""How long the services may take until they answer: on a busy machine imports alone take ten."""

STOP_SECONDS = 15.0
"""How long they may take to stop; what they do then is bounded by QUEUE_GRACE_SECONDS, 8."""

POLL_SECONDS = 0.05

NOTICE_SECONDS = 0.3
"""How long after its connections were closed a process may still count as running."""

LAST_LINES = 15
"""How much of a log is shown when something went wrong."""

ACCESS_LOG = " nameko.web.server: "
"""Who logs each request; most of them are ours, who wait."""


class DemoError(Exception):
    """Raised when it cannot go on for a reason that needs no traceback."""


class ServiceEndedError(DemoError):
    """Raised when a service ended although nobody told it to.

    :param service: its name.
    """

    def __init__(self, service: str, status: int) -> None:
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        super().__init__(f"{service} {how}")
        self.service = service


class Services:
    """The processes of the services; leaving the context ends them, whatever happened.

    :param logs: a folder for a log file each; ``None`` pipes the output to whoever reads it.
    """

    def __init__(self, logs: Path | None = None) -> None:
        self._logs = logs
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: Any, _trace: TracebackType | None
    ) -> None:
        with undisturbed():
            self.stop()

    def start(self, service: str) -> subprocess.Popen[str]:
        """Start one; it is not up yet when this returns.

        :raises DemoError: when it cannot be started at all.
        """
        log = self._logs and self._logs / f"{service}.log"
        try:
            with log.open("w") if log else contextlib.nullcontext(subprocess.PIPE) as output:
                self.processes[service] = _nameko_run(service, output)
        except OSError as exc:
            raise DemoError(f"cannot start {service}: {exc}") from exc
        return self.processes[service]

    def check(self) -> None:
        """See whether all that were started still run.

        :raises ServiceEndedError: for the first that does not.
        """
        for service, process in self.processes.items():
            status = process.poll()
            if status is not None:
                raise ServiceEndedError(service, status)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for a condition, while the services run.

        :raises DemoError: when it does not come true in time.
        :raises ServiceEndedError: when a service ends meanwhile.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise DemoError(f"waited {seconds:g} s in vain for {what}")
            time.sleep(POLL_SECONDS)

    def explain(self, error: DemoError) -> DemoError:
        """Return the end of a service if that may be behind an error, else the error."""
        try:
            self.wait_until(lambda: False, NOTICE_SECONDS, "the end of a service")
        except ServiceEndedError as exc:
            return exc
        except DemoError:
            pass
        return error

    def stop(self) -> None:
        """Ask all to end, and kill those that do not."""
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def last_lines(self, service: str) -> list[str]:
        """Return the end of a service's log, where it has one, without the requests."""
        log = self._logs and self._logs / f"{service}.log"
        if log is None or not log.exists():
            return []
        lines = log.read_text(errors="replace").splitlines()
        return [line for line in lines if ACCESS_LOG not in line][-LAST_LINES:]


def _nameko_run(service: str, output: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [NAMEKO, "run", "--config", CONFIG, f"services.{service}"],
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # out of Ctrl-C's reach: it is we who end it
        start_new_session=True,
    )


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore signals for a while: an impatient second Ctrl-C would leave processes behind."""
    each = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(one, signal.SIG_IGN) for one in each]
    try:
        yield
    finally:
        for one, handler in zip(each, before, strict=True):
            signal.signal(one, handler)


def check_free(service: str, address: Address) -> None:
    """See whether a service can listen.

    :raises DemoError: when another program does.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        # as servers do: connections that linger are in nobody's way
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as exc:
            raise DemoError(f"{service} cannot listen on {address}: {exc.strerror}") from exc


def read_config() -> Mapping[str, Any]:
    """Read config.yml as the services do."""
    setup_yaml_parser()
    config: Mapping[str, Any] = yaml.safe_load(CONFIG.read_text())
    return config
