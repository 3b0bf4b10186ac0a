"""A mail server for tests: ``smtp_server.py --fd 3 --mails mails.jsonl``.

It runs as a process of its own, on a socket that whoever starts it listens on, so that
nobody has to wait for it. A mail that it took is a line of the file before the client
hears of it. What it says to an address depends on the part before the @::

    refused    550 to RCPT
    later      451 to the first RCPT, 250 to those after it
    unwanted   554 to DATA
    crowded    452 to DATA
    slow       250 to DATA, after a fifth of a second
    silent     nothing at all to DATA

A sender called ``banned`` gets 550 to MAIL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import ssl
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

ANSWERS = {"unwanted": "554 5.6.0 not wanted", "crowded": "452 4.3.1 no space"}


class Handler:
    """Decides about senders and recipients, and writes down what it took."""

    def __init__(self, mails: Path) -> None:
        self.mails = mails
        self.postponed: set[str] = set()

    async def handle_MAIL(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address.startswith("banned@"):
            return "550 5.7.1 no mail from there"
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        name = address.split("@")[0]
        if name == "refused":
            return "550 5.1.1 no such user"
        if name == "later" and address not in self.postponed:
            self.postponed.add(address)
            return "451 4.7.1 come back later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        name = envelope.rcpt_tos[0].split("@")[0]
        if name == "silent":
            await asyncio.Event().wait()
        if name == "slow":
            await asyncio.sleep(0.2)
        if name in ANSWERS:
            return ANSWERS[name]
        self.write_down(server, session, envelope)
        return "250 2.0.0 taken"

    def write_down(self, server: SMTP, session: Session, envelope: Envelope) -> None:
        mail = {
            "from": envelope.mail_from,
            "to": envelope.rcpt_tos,
            "options": envelope.mail_options,
            "content": (envelope.original_content or b"").decode("latin-1"),
            "tls": server.transport.get_extra_info("sslcontext") is not None,
            "user": session.auth_data,
        }
        with self.mails.open("a") as file:
            file.write(json.dumps(mail) + "\n")


def authenticate(_server: Any, _session: Any, _envelope: Any, _kind: str, data: Any) -> AuthResult:
    """Let in whoever knows the password."""
    known = (data.login, data.password) == (b"us er", b"pass/word")
    return AuthResult(success=known, handled=False, auth_data=data.login.decode())


async def serve(options: argparse.Namespace) -> None:
    """Serve until killed."""
    tls = None
    if options.tls:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options.certificate)
    handler = Handler(options.mails)

    def protocol() -> SMTP:
        return SMTP(
            handler,
            hostname="localhost",
            enable_SMTPUTF8=options.smtputf8,
            tls_context=tls if options.tls == "starttls" else None,
            authenticator=authenticate,
            auth_required=options.auth,
            auth_require_tls=False,
        )

    server = await asyncio.get_running_loop().create_server(
        protocol,
        sock=socket.socket(fileno=options.fd),
        ssl=tls if options.tls == "smtps" else None,
    )
    await server.serve_forever()


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--mails", type=Path, required=True)
    parser.add_argument("--tls", choices=["starttls", "smtps"])
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--auth", action="store_true")
    parser.add_argument("--no-smtputf8", dest="smtputf8", action="store_false")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
