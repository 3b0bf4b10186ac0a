"""An interpreter that has imported what every service does, and forks who runs ``nameko run``.

To import takes a service ten times as long as all else until it is ready, and the tests start
hundreds. What is forked here is a process of its own, which runs nameko's command line, and is
killed like any other. Those of the demo, of the documents and of the chaos kit are started
anew each.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from typing import Any, NamedTuple

# in the order of ``nameko run``, which patches before it imports a service
from nameko.cli.main import main  # isort: skip
import eventlet
from eventlet import hubs

eventlet.monkey_patch()

import nameko.cli.run  # noqa: E402
import nameko.web.handlers  # noqa: E402, F401

import shared.events  # noqa: E402
import shared.providers.embedded  # noqa: E402
import shared.providers.rabbitmq.provider  # noqa: E402
import shared.providers.redis.provider  # noqa: E402
import shared.rpc  # noqa: E402, F401
from shared.native import socket  # noqa: E402

MOST_BYTES = 1 << 17
"""The longest request, of a socket that keeps each in one piece."""


class Start(NamedTuple):
    """A process to be: its arguments, its environment, and where its output goes."""

    arguments: list[str]
    env: dict[str, str]
    output: int


def serve(asker: Any) -> Start | None:
    """Fork, and say how who was forked ended; return in the fork, and at last without one.

    :param asker: the socket of who asks. Its requests are JSON: of a start, with a descriptor,
        or a process id.
    """
    while True:
        data, descriptors, _, _ = socket.recv_fds(asker, MOST_BYTES, 1)
        if not data:
            return None
        request = json.loads(data)
        if isinstance(request, int):
            pid, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            [output] = descriptors
            answer = os.fork()
            if answer == 0:
                asker.close()
                return Start(*request, output)
            os.close(output)
        asker.send(json.dumps(answer).encode())


def become(start: Start) -> None:
    """Be what a process is that was started so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor in (1, 2):
        os.dup2(start.output, descriptor)
    os.close(start.output)
    os.environ.clear()
    os.environ.update(start.env)
    sys.argv = start.arguments


if __name__ == "__main__":
    hubs.use_hub()  # forget the one that patching made: each fork is to have its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and that this
    gc.freeze()  # what is collected would have to be copied
    start = serve(socket.socket(fileno=int(sys.argv[1])))
    if start is not None:
        become(start)
        sys.exit(main())
