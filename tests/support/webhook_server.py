"""A server that is posted to: ``webhook_server.py --fd 3 --posts posts.jsonl --failing file``.

As a process of its own, since whoever starts it waits on eventlet's hub. What it was sent is a
line of the file before the client hears of it. It answers 204, and 500 while there is a file
``failing``.
"""

from __future__ import annotations

import argparse
import json
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--posts", type=Path, required=True)
    parser.add_argument("--failing", type=Path, required=True)
    given = parser.parse_args()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = 500 if given.failing.exists() else 204
            post = {
                "path": self.path,
                "key": self.headers["Idempotency-Key"],
                "type": self.headers["Content-Type"],
                "body": json.loads(body),
                "status": status,
            }
            with given.posts.open("a") as posts:
                posts.write(json.dumps(post) + "\n")
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket = socket.socket(fileno=given.fd)
    server.serve_forever()


if __name__ == "__main__":
    main()
