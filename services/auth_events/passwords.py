"""Passwords: kept as argon2id hashes, and shown nowhere."""

from __future__ import annotations

import base64
import os
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from eventlet import tpool
from eventlet.semaphore import Semaphore

SHORTEST = 8
LONGEST = 1024
"""Characters of a password."""

HASHES_AT_A_TIME = 4
"""Each takes 64 MiB, and as many cores as it has lanes (4)."""

_hasher = PasswordHasher()
_turns = Semaphore(HASHES_AT_A_TIME)


@dataclass(frozen=True, slots=True)
class Password:
    """A password that somebody sent; neither its ``repr`` nor its ``str`` shows it."""

    text: str = field(repr=False)

    @property
    def normal(self) -> str:
        """The form that is hashed: keyboards differ in how they compose an ``é``."""
        return unicodedata.normalize("NFKC", self.text)


def hash_password(password: Password) -> str:
    """Return what is stored of a password: salt, parameters and hash."""
    return str(_in_thread(_hasher.hash, password.normal))


def is_right(stored: str | None, password: Password) -> bool:
    """Say whether ``stored`` was made of ``password``.

    Without ``stored`` (nobody has that name) the answer is no, and takes as long.
    """
    try:
        _in_thread(_hasher.verify, stored or _NOBODYS, password.normal)
    except VerifyMismatchError:
        return False
    return stored is not None


def is_outdated(stored: str) -> bool:
    """Say whether a hash was made with other parameters than are used now."""
    return _hasher.check_needs_rehash(stored)


def _in_thread(function: Any, *args: str) -> Any:
    # argon2 is C code that would stop eventlet's hub for as long as it takes
    with _turns:
        return tpool.execute(function, *args)


def _nobodys() -> str:
    """Make a hash, with the parameters used now, that no password is known for."""
    cost = f"m={_hasher.memory_cost},t={_hasher.time_cost},p={_hasher.parallelism}"
    return f"$argon2id$v=19${cost}${_noise(_hasher.salt_len)}${_noise(_hasher.hash_len)}"


def _noise(length: int) -> str:
    return base64.b64encode(os.urandom(length)).decode().rstrip("=")


_NOBODYS = _nobodys()
