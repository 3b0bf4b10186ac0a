"""Real ``nameko run`` processes, for tests that kill them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
            self.process = subprocess.Popen(
                self.arguments,
                cwd=ROOT,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

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


def _clean_environment() -> dict[str, str]:
    ours = ("QUEUE_", "REDIS_", "RABBITMQ_", "DB_", "MAIL_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {**kept, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
