"""What the private servers of tests are given."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from shared.testing.servers import HOST, reserve_port


def test_a_reserved_port_is_free_for_servers_alone() -> None:
    with closing(reserve_port()) as reserved, closing(socket.socket()) as taker:
        address = reserved.getsockname()
        with pytest.raises(OSError, match="in use"):
            taker.bind(address)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)
        with (
            closing(socket.create_server(address)),
            closing(socket.create_connection(address, timeout=5)) as client,
        ):
            assert client.getpeername() == address
        assert address[0] == HOST
