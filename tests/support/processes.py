"""Real ``nameko run`` processes, for tests that kill them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from shared.native import socket
from tests.support.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
NAMEKO = Path(sys.executable).parent / "nameko"

STILL = {"T", "t", "Z", "X"}
"""The states of a thread that does nothing: stopped, or dead."""


class NamekoProcess:
    """One ``nameko run``; its output goes to a file that failures show.

    :param before: a command that runs it.
    """

    def __init__(
        self,
        *services: str,
        env: Mapping[str, str],
        log: Path,
        arguments: Sequence[str] = (),
        before: Sequence[str] = (),
    ) -> None:
        self.log = log
        self.arguments = [*before, str(NAMEKO), "run", *arguments, *services]
        self.env = {**_clean_environment(), **env}
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as output:
            if self._is_usual:
                self.process: subprocess.Popen[bytes] | Forked = _warm().start(
                    self.arguments, self.env, output
                )
            else:
                self.process = _start_anew(self.arguments, self.env, output)

    @property
    def _is_usual(self) -> bool:
        """Whether it has what an interpreter is told at its start in common with others."""
        return self.arguments[0] == str(NAMEKO) and _told(self.env) == _told(_clean_environment())

    @property
    def pid(self) -> int:
        return self.process.pid

    def processor_seconds(self) -> float:
        """Return how much processor time it has used, as proc(5) has it in ``stat``."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL: nothing is finished, nothing handed back."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout: float = 15) -> int:
        """SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self._start()

    def stop(self) -> None:
        """End it, one way or the other."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(12)
            except subprocess.TimeoutExpired:
                self.kill()

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _start_anew(
    arguments: Sequence[str], env: Mapping[str, str], output: BinaryIO | int, **options: Any
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=env,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        **options,
    )


class Warm:
    """The interpreter that forks; see ``warm.py``."""

    def __init__(self) -> None:
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            command = [sys.executable, "-m", "tests.support.warm", str(its.fileno())]
            output = sys.__stderr__.fileno()
            self._process = _start_anew(
                command, _clean_environment(), output, pass_fds=[its.fileno()]
            )

    def start(self, arguments: Sequence[str], env: Mapping[str, str], output: BinaryIO) -> Forked:
        """Have a process forked that runs a command of nameko's."""
        request = json.dumps([arguments, env]).encode()
        socket.send_fds(self._socket, [request], [output.fileno()])
        return Forked(self, self._answer())

    def status_of(self, pid: int) -> int | None:
        """Return the exit status of a process, as :mod:`subprocess` has it, once it ended."""
        self._socket.send(json.dumps(pid).encode())
        status: int | None = self._answer()
        return status

    def _answer(self) -> Any:
        return json.loads(self._socket.recv(100))


@cache
def _warm() -> Warm:
    return Warm()


class Forked:
    """What of :class:`subprocess.Popen` the tests use, for a process that another one forked."""

    def __init__(self, warm: Warm, pid: int) -> None:
        self._warm = warm
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._warm.status_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if timeout is not None and deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def freeze(pid: int) -> None:
    """SIGSTOP, and return once every thread stands still: until then some may go on and answer."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _states(pid) <= STILL, 10, lambda: f"{pid} to stop: {_states(pid)}")


def _states(pid: int) -> set[str]:
    """Return the states of a process's threads, as proc(5) has them in ``stat``."""
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        # one may end meanwhile
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(task.read_text().rpartition(")")[2].split()[0])
    return found


class Effects:
    """The independent record: a line that a handler appended for each time it ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self, **wanted: Any) -> list[dict[str, Any]]:
        return _those(self._lines(), wanted)

    def wait_for(self, count: int, timeout: float = 20, **wanted: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        read = 0

        def is_enough() -> bool:
            # each line once: thousands, read again and again, take the time of who writes them
            nonlocal read
            new = self._lines(read)
            read += len(new)
            found.extend(_those(new, wanted))
            return len(found) >= count

        wait_until(is_enough, timeout, lambda: f"{count} effects like {wanted}, only {len(found)}")
        return found

    def _lines(self, start: int = 0) -> bytes:
        """Return the lines from there on; a handler that was killed may have left half of one."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(start)
            text = file.read()
        return text[: text.rfind(b"\n") + 1]


def _those(lines: bytes, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines.splitlines()]
    return [each for each in found if wanted.items() <= each.items()]


def _told(env: Mapping[str, str]) -> dict[str, str]:
    """Return what an interpreter reads at its start, or has read for it."""
    return {k: v for k, v in env.items() if k.startswith(("PYTHON", "EVENTLET", "LD_"))}


def _clean_environment() -> dict[str, str]:
    ours = ("QUEUE_", "REDIS_", "RABBITMQ_", "DB_", "MAIL_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {**kept, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
