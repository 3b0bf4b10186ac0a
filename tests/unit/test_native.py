"""How threads wake each other."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from typing import Any

from eventlet.event import Event

from shared.native import Inbox, Mailbox, select, start_natively
from tests.support.waiting import wait_until


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


class TestMailbox:
    def test_has_an_answer_that_waits_hold_up_no_other_for_ever(self) -> None:
        mailbox, end = Mailbox(), Event()
        heard: list[str] = []
        mailbox.open()

        def wait() -> None:
            end.wait()
            heard.append("first")

        start_natively(mailbox.answer, wait)
        wait_until(
            lambda: mailbox._reader and not mailbox._is_listening, 10, "the first to be called"
        )
        start_natively(mailbox.answer, heard.append, "second")
        wait_until(lambda: mailbox._answers, 10, "the second to be there")
        end.send()
        wait_until(lambda: heard == ["first", "second"], 10, lambda: str(heard))
        start_natively(mailbox.answer, heard.append, "third")
        wait_until(lambda: heard[2:] == ["third"], 10, lambda: str(heard))
        mailbox.close()

    def test_hands_out_what_is_left_when_it_is_closed(self) -> None:
        mailbox, heard = Mailbox(), list[str]()
        mailbox.open()
        mailbox.answer(heard.append, "late")
        mailbox.close()
        assert heard == ["late"]


LOGGERS = """
import eventlet; eventlet.monkey_patch()
import logging, os, sys, time
sys.setswitchinterval(1e-6)
from shared.native import Thread
stop = []
def ask(prefix):
    for n in range(100):
        logging.getLogger(f"{prefix}{n}").isEnabledFor(10)
        logging.getLogger(f"{prefix}{n}")._cache.clear()
def ask_on():
    while not stop:
        ask("thread")
thread = Thread(ask_on, "asks")
thread.start()
end = time.monotonic() + 0.5
while time.monotonic() < end:
    ask("hub")
    eventlet.sleep(0)
stop.append(1)
print("ended", thread.join(5), flush=True)
os._exit(0)
"""
"""A thread and the hub that ask for loggers at once, in turns of a microsecond."""


def test_a_thread_and_the_hub_may_ask_for_loggers_at_once() -> None:
    """As alembic and SQLAlchemy do as a service starts: it waited for ever."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOGGERS],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout == "ended True\n", done.stderr
