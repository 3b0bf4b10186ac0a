"""Declares queues anew and is killed at each point on the way; then again, to the end.

``python -m tests.flow.apps.crashes upgrade``: for the first, the second, the third … time
that something is sent to RabbitMQ, a new queue is made, the command is killed there and run
again. It prints what is wrong, or ``all points``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter

import amqp

from shared.providers.rabbitmq import upgrade
from shared.providers.rabbitmq.driver import Connection, targets_of
from shared.settings import load_settings
from shared.types import Subscription

SETTINGS = load_settings()
MESSAGES = 7

# nobody consumes here, and nobody publishes
upgrade.LISTEN_SECONDS = upgrade.ROUTED_SECONDS = 0.0
upgrade.LOOK_SECONDS = 0.01
upgrade.MOST_AT_ONCE = 3


def in_child(step, *args):
    """Do something in a process of its own; return whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            step(*args)
        except BaseException as exc:
            print(repr(exc), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "it failed"
    return os.WIFEXITED(status)


def redeclare(subscription, direction, kill_at=None):
    sends = 0
    flush = Connection.flush

    def flush_or_die(self):
        nonlocal sends
        is_something = bool(self.transport.unsent)
        done = flush(self)
        if is_something:
            sends += 1
            if sends == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return done

    Connection.flush = flush_or_die
    redeclaration = upgrade.Redeclaration(SETTINGS, is_upgrade=direction == "upgrade")
    report = redeclaration.do(subscription)
    assert not report.is_failure, report
    redeclaration.close()


def channel():
    [target] = targets_of(SETTINGS.rabbitmq_uri)
    connection = amqp.Connection(
        target.host, target.user, target.password, virtual_host=target.vhost
    )
    connection.connect()
    return connection, connection.channel()


def prepare(subscription, direction):
    connection, its = channel()
    name = upgrade.queue_name(subscription)
    arguments = {} if direction == "upgrade" else upgrade.Layout(False).arguments(subscription)
    its.exchange_declare("source.events", "topic", durable=True, auto_delete=False)
    its.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
    its.queue_bind(name, "source.events", subscription.event_type)
    for n in range(MESSAGES):
        ours = {"message_id": f"m{n}", "application_headers": {"queue-name": "source"}}
        its.basic_publish(amqp.Message(str(n), **(ours if n % 2 else {})), "", name)
    connection.close()


def publish(subscription, text):
    """Publish an event, as who knows nothing of all this."""
    connection, its = channel()
    its.confirm_select()
    its.basic_publish_confirm(amqp.Message(text), "source.events", subscription.event_type)
    connection.close()


def found_in(subscription):
    connection, its = channel()
    found = []
    while message := its.basic_get(upgrade.queue_name(subscription), no_ack=True):
        found.append(message.body)
    wanted = upgrade.Layout(False).arguments(subscription)
    arguments = wanted if sys.argv[1] == "upgrade" else {}
    name = upgrade.queue_name(subscription)
    its.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)
    for what in ("moving", "arriving", "busy", "paused"):
        try:
            its.queue_declare(upgrade.beside(name, what), passive=True)
        except amqp.NotFound:
            its = connection.channel()
        else:
            raise AssertionError(f"{what} is left")
    connection.close()
    return found


def main(direction):
    point = 0
    is_whole = False
    while not is_whole:
        point += 1
        subscription = Subscription("source", "source", f"thing.{point}", "recorder.first")
        prepare(subscription, direction)
        is_whole = in_child(redeclare, subscription, direction, point)
        publish(subscription, "meanwhile")
        assert in_child(redeclare, subscription, direction)
        publish(subscription, "afterwards")
        found = found_in(subscription)
        check(point, found)
    print(f"{point} points")
    print("all points")


def check(point, found):
    texts = [str(n) for n in range(MESSAGES)]
    counts = Counter(found)
    print(point, found, flush=True)
    assert counts.keys() == {*texts, "meanwhile", "afterwards"}, (point, found)
    # what was put into the other queue and not taken out of the first before the end
    assert counts.total() - len(counts) <= upgrade.MOST_AT_ONCE, (point, found)
    first = [each for n, each in enumerate(found) if each not in found[:n]]
    assert [each for each in first if each in texts] == texts, (point, found)


if __name__ == "__main__":
    main(sys.argv[1])
