"""A mail server that refuses one address, and is not ready for another at first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from services.demo.processes import HOST, DemoError


class Mailbox:
    """Decides about mails, and keeps what it takes as files.

    :param refused: gets 550 until :meth:`accept` is called.
    :param postponed: gets 451 the first time.
    """

    def __init__(self, folder: Path, refused: str, postponed: str) -> None:
        self.folder = folder
        self.recipients: list[str] = []
        self._refused = {refused}
        self._postponed = {postponed}

    def accept(self, address: str) -> None:
        """Refuse an address no longer."""
        self._refused.discard(address)

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: object
    ) -> str:
        """Answer for one recipient."""
        if address in self._refused:
            return "550 5.1.1 no such mailbox"
        if address in self._postponed:
            self._postponed.remove(address)
            return "451 4.7.1 not now"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(  # noqa: N802 - aiosmtpd's name
        self, _server: SMTP, _session: Session, envelope: Envelope
    ) -> str:
        """Take a mail."""
        self.recipients += envelope.rcpt_tos
        mail = self.folder / f"{len(self.recipients):02}.eml"
        mail.write_bytes(envelope.original_content or b"")
        return "250 2.0.0 taken"


@contextlib.contextmanager
def serving(mailbox: Mailbox, port: int) -> Iterator[None]:
    """Serve on a port, in a thread.

    :raises DemoError: when it cannot.
    """
    mailbox.folder.mkdir()
    controller = Controller(mailbox, hostname=HOST, port=port)
    try:
        controller.start()
    except OSError as exc:
        raise DemoError(f"the mail server cannot listen on {HOST}:{port}: {exc}") from exc
    try:
        yield
    finally:
        controller.stop()
