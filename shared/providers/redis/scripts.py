"""The Lua scripts: files that include each other, known to Redis by their digests."""

from __future__ import annotations

import re
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any

from shared.providers.redis.servers import Server, driver
from shared.providers.redis.wire import Command

_LUA = Path(__file__).with_name("lua")
_INCLUDE = re.compile(r"^-- @include (\w+)$", re.MULTILINE)


@cache
def _source(name: str) -> str:
    """Return a script with what it includes."""
    text = (_LUA / f"{name}.lua").read_text()
    return _INCLUDE.sub(lambda found: _source(found[1]), text)


@cache
def _digest(name: str) -> str:
    return sha1(_source(name).encode(), usedforsecurity=False).hexdigest()


def script(name: str, keys: list[str], *args: Any) -> Command:
    return Command(keys[0], ("EVALSHA", _digest(name), len(keys), *keys, *args))


def load_scripts(server: Server) -> None:
    names = sorted(path.stem for path in _LUA.glob("[a-z]*.lua"))
    server.ask_everywhere([("SCRIPT", "LOAD", _source(name)) for name in names])


def is_unknown_script(answer: Any) -> bool:
    return isinstance(answer, driver().exceptions.NoScriptError)
