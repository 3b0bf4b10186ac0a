"""The scripts of the redis provider, as files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.providers import redis
from shared.providers.redis import provider, rpc, scripts, wire

LUA = Path(redis.__file__).with_name("lua")

SCRIPTS = sorted(LUA.glob("[a-z]*.lua"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
class TestScript:
    def test_says_what_it_takes_and_returns(self, path: Path) -> None:
        head = path.read_text().partition("-- @include")[0]
        assert head.startswith("#!lua")
        assert re.findall(r"^-- (KEYS|ARGV|Returns) ", head, re.MULTILINE) == [
            "KEYS",
            "ARGV",
            "Returns",
        ]

    def test_has_what_it_includes(self, path: Path) -> None:
        source = scripts._source(path.stem)
        assert "@include" not in source
        assert source.count("local function milliseconds(") == 1

    def test_is_used(self, path: Path) -> None:
        code = [Path(module.__file__).read_text() for module in (provider, rpc)]
        assert f'script("{path.stem}"' in "".join(code)


def test_a_lost_lease_has_the_number_of_the_scripts() -> None:
    found = re.findall(r"^local ([A-Z_]+) = (-\d+)$", (LUA / "_queue.lua").read_text(), re.M)
    assert found == [("LEASE_LOST", str(wire.LEASE_LOST))]


def test_an_undeclared_queue_has_the_number_of_the_script() -> None:
    found = re.findall(r"^local ([A-Z_]+) = (-\d+)$", (LUA / "rpc_send.lua").read_text(), re.M)
    assert found == [("NOT_DECLARED", str(rpc.NOT_DECLARED))]
