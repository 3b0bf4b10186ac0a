"""A clock that jumps, for processes that are started with it."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


class Clock:
    """The time of day of some processes; only where a C compiler is there to make it.

    :param folder: for the library, and the file by which it is moved.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock-offset"
        self._library = folder / "clock.so"
        self._set(0)
        self.has_moved = False
        self.is_there = (compiler := shutil.which("cc")) is not None
        if compiler:
            made = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), str(SOURCE)]
            subprocess.run([*made, "-ldl"], check=True)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process is started with, so that its clock is this one."""
        if not self.is_there:
            return {}
        return {"LD_PRELOAD": str(self._library), "CLOCK_OFFSET": str(self._file)}

    @contextlib.contextmanager
    def moved(self, seconds: float) -> Iterator[None]:
        """Move it, and back."""
        self.has_moved = True
        self._set(seconds)
        try:
            yield
        finally:
            self._set(0)

    def _set(self, seconds: float) -> None:
        # in place: it is mapped into memory where it is read
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("q", round(seconds * 1000)))
