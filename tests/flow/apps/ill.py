"""The tally, in a process whose provider falls ill as a file says; and looks for it often."""

import contextlib
import os
from pathlib import Path

from amqp import spec

from services.queue_admin import QueueAdminService
from shared.events import apart, watch
from shared.native import sleep
from shared.providers.rabbitmq import RabbitMQProvider
from shared.providers.redis import RedisProvider
from tests.flow.apps.tally import Tally

apart.SIGN_SECONDS = 0.5
apart.SWEEP_SECONDS = 0.3
watch.FIRST_PAUSE_SECONDS = 0.5
apart.HANGING_LOOKS = int(os.environ["HANGING_LOOKS"])

ORDER = Path(os.environ["EFFECTS"]).with_name("order")


def is_ordered(what):
    """Say whether it is this that the file orders, and take the order."""
    with contextlib.suppress(FileNotFoundError):
        if ORDER.read_text() == what:
            ORDER.unlink()
            return True
    return False


class Ill:
    """What every provider can have."""

    def reserve(self, limits, limit, tx=None):
        if limits and is_ordered("hang"):
            sleep(1000)
        if ORDER.exists() and ORDER.read_text() == "starve":
            return []
        return super().reserve(limits, limit, tx)


class Redis(Ill, RedisProvider):
    def wait(self, timeout, interrupt, hungry=True):
        if hungry and self._listener is not None and is_ordered("deaf"):
            # alive, and nobody tells it anything
            self._listener._connection.send_command("UNSUBSCRIBE")
        super().wait(timeout, interrupt, hungry)


class RabbitMQ(Ill, RabbitMQProvider):
    def _wait(self, deadline, interrupt, hungry):
        if hungry and self._mine and is_ordered("deaf"):
            self._inlet.arm(self._wanted())
            for each in self._inlet._active():
                # RabbitMQ knows nothing of it any more, and it does not know that
                self._inlet._channel._callbacks[spec.Basic.CancelOk] = lambda tag: None
                self._inlet._channel.cancel(each.tag)
        return super()._wait(deadline, interrupt, hungry)


__all__ = ["QueueAdminService", "Tally"]
