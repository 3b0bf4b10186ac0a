"""The recorder, in a process that RabbitMQ misses after seconds and not after half a minute."""

from shared.providers.rabbitmq import driver
from tests.flow.apps.recorder import Recorder

driver.HEARTBEAT_SECONDS = 4

__all__ = ["Recorder"]
