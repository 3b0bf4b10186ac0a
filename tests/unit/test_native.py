"""How threads wake each other."""

from __future__ import annotations

from collections import deque
from typing import Any

from shared.native import Inbox, select, start_natively


class Interrupted(deque[Any]):
    """Has another thread send something at the moment that one has sent."""

    inbox: Inbox
    is_over = False

    def append(self, command: Any) -> None:
        super().append(command)
        if not self.is_over:
            self.is_over = True
            self.inbox.send("of the other")


def is_rung(inbox: Inbox) -> bool:
    return bool(select([inbox.fileno()], [], [], 0)[0])


class TestInbox:
    def test_rings_when_two_send_at_the_same_time(self) -> None:
        inbox = Inbox()
        inbox._commands = commands = Interrupted()
        commands.inbox = inbox

        inbox.send("of one")

        assert is_rung(inbox)
        assert inbox.take() == ["of one", "of the other"]
        inbox.close()

    def test_rings_once_for_what_is_taken_together(self) -> None:
        inbox = Inbox()
        inbox.send(1)
        inbox._signal.clear()
        inbox.send(2)
        assert not is_rung(inbox)
        assert inbox.take() == [1, 2]
        inbox.send(3)
        assert is_rung(inbox)
        inbox.close()


def test_a_native_thread_runs_while_the_hub_is_kept() -> None:
    inbox = Inbox()
    start_natively(inbox.send, "of the thread")
    # this wait lets no greenthread run
    assert select([inbox.fileno()], [], [], 10)[0]
    assert inbox.take() == ["of the thread"]
    inbox.close()
