"""A process beside the tests', which does to the provider what it is told to.

``python -m shared.testing.conformance.process`` reads a command as JSON from each line of standard
input, and answers each by a line.
"""

from __future__ import annotations

import eventlet

eventlet.monkey_patch()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from dataclasses import asdict  # noqa: E402
from time import monotonic  # noqa: E402
from typing import Any  # noqa: E402

from shared.testing.conformance.lab import ProviderLab, Worker, lab_class, seqs  # noqa: E402
from shared.types import Subscription  # noqa: E402

CONSUME_SECONDS = 30.0
"""How long a process consumes at most, should what it waits for never end."""


class Process:
    """Starts such a process, and tells it what to do."""

    def __init__(self) -> None:
        self.is_killed = False
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__],
            # whatever the tests can import, their processes can
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def open(self, lab: ProviderLab, *declared: Subscription) -> None:
        """Have it make an instance of the lab's provider."""
        name = f"{type(lab).__module__}:{type(lab).__qualname__}"
        self.ask("open", name, lab.config, [asdict(each) for each in declared])

    def tell(self, command: str, *args: Any) -> None:
        """Give it a command, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *args]) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer to the oldest command that has none yet."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process ended with status {self._process.wait()}"
        return json.loads(line)

    def ask(self, command: str, *args: Any) -> Any:
        """Give it a command; return its answer."""
        self.tell(command, *args)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL: it lets go of nothing."""
        self.is_killed = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class _Commands:
    """What such a process can do; each method is a command."""

    _worker: Worker

    def open(self, lab: str, config: Mapping[str, str], declared: list[Any]) -> None:
        self._worker = Worker(lab_class(lab)(config), f"process {os.getpid()}")
        self._worker.open(*[Subscription(**each) for each in declared])

    def close(self) -> None:
        self._worker.close()

    def dispatch(self, event_type: str, count: int, delay: float | None) -> list[int]:
        return seqs(self._worker.dispatch(event_type, count, delay=delay))

    def reserve(self, count: int) -> list[int]:
        return seqs(self._worker.reserve(count))

    def resume(self, subscription: Any, after: float) -> None:
        eventlet.sleep(after)
        self._worker.provider.resume(Subscription(**subscription))

    def consume(self, batch: int, total: int) -> list[list[int]]:
        """Reserve and acknowledge until ``total`` deliveries are finished, whoever had them;
        return which this process had, and which of them it was refused.

        After a first batch it waits until another process has one, too: on a busy machine it
        may be through with all of them before the other begins."""
        had: list[int] = []
        refused: list[int] = []
        is_alone = True
        deadline = monotonic() + CONSUME_SECONDS
        while monotonic() < deadline:
            if had and is_alone:
                is_alone = self._worker.finished() <= len(had)
                eventlet.sleep(0.01)
                continue
            leases = self._worker.reserve(batch)
            had += seqs(leases)
            if leases:
                refused += seqs(self._worker.acknowledge(*leases))
            elif self._worker.finished() == total:
                break
            else:
                self._worker.wait(0.05)
        return [had, refused]


def main() -> None:
    commands = _Commands()
    for line in sys.stdin:
        command, *args = json.loads(line)
        print(json.dumps(getattr(commands, command)(*args)), flush=True)


if __name__ == "__main__":
    main()
