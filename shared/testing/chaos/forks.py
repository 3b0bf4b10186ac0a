"""Processes that are killed: each a fork of the tests' own, so that nothing has to be imported
anew, and whatever a test has made is there."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from eventlet import hubs

from shared import clock
from shared.native import select

CHILD_SECONDS = 60.0
"""How long such a process may take."""


AT_ONCE = min(os.cpu_count() or 1, 4)
"""How many such processes work at once, of those that need not wait for each other."""


class ChildError(Exception):
    """Raised when something went wrong in such a process; the text is its traceback."""


class ChildKilledError(ChildError):
    """Raised when such a process was killed."""


def in_child(work: Callable[[], Any], folder: Path) -> Any:
    """Return what ``work`` returns in a process of its own.

    :param folder: where the process works.
    :raises ChildError: when ``work`` raises, takes too long, or is killed.
    """
    return _Child(work, folder).result()


def is_killed(work: Callable[[], Any], folder: Path) -> bool:
    """Say whether a process of its own, which does ``work``, is killed meanwhile.

    :raises ChildError: when ``work`` raises, or takes too long.
    """
    try:
        in_child(work, folder)
    except ChildKilledError:
        return True
    return False


def in_children(jobs: Iterable[tuple[Callable[[], Any], Path]]) -> list[Any]:
    """Return what each of several does, in its order; as many at once as there are processors."""
    results: list[Any] = []
    running: deque[_Child] = deque()
    try:
        for job in jobs:
            if len(running) >= AT_ONCE:
                results.append(running.popleft().result())
            running.append(_Child(*job))
        while running:
            results.append(running.popleft().result())
    finally:
        for child in running:
            child.kill()
    return results


class _Child:
    """A process at work, and the pipe by which it tells what came of it."""

    def __init__(self, work: Callable[[], Any], folder: Path) -> None:
        self._deadline = monotonic() + CHILD_SECONDS
        self._reader, writer = os.pipe()
        with warnings.catch_warnings():
            # of this process's threads, and their locks, the child uses none
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            _work(work, folder, writer)
        os.close(writer)

    def result(self) -> Any:
        try:
            told = self._read()
        except BaseException:
            self.kill()
            raise
        os.close(self._reader)
        _, status = os.waitpid(self._pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            raise ChildKilledError(f"process {self._pid} was killed")
        is_well, result = pickle.loads(told)  # noqa: S301 - of our own making
        if not is_well:
            raise ChildError(result)
        return result

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._reader)

    def _read(self) -> bytes:
        parts = []
        while True:
            if not select([self._reader], [], [], max(0.0, self._deadline - monotonic()))[0]:
                raise ChildError(f"took longer than {CHILD_SECONDS} s")
            parts.append(os.read(self._reader, 1 << 20))
            if not parts[-1]:
                return b"".join(parts)


def _work(work: Callable[[], Any], folder: Path, writer: int) -> None:
    """Do the work, and end the process."""
    try:
        gc.disable()  # what could be collected is the parent's, and this process ends soon
        clock.replace(None)
        hubs.use_hub()  # whose greenthreads are the parent's
        os.chdir(folder)
        told = pickle.dumps((True, work()))
    except BaseException:
        told = pickle.dumps((False, traceback.format_exc()))
    try:
        while told:
            told = told[os.write(writer, told) :]
    finally:
        os._exit(0)
