"""A service whose process dies between storing an event and giving it to the broker."""

import os

import eventlet
from nameko.testing.services import once

from shared.events import EventDispatcher
from shared.providers.rabbitmq import RabbitMQProvider
from shared.providers.redis import RedisProvider
from tests.flow.apps import hasty  # noqa: F401 - shortens how long others wait for it


class OnRedis(RedisProvider):
    def publish(self, deliveries, tx=None):
        os._exit(9)


class OnRabbitMQ(RabbitMQProvider):
    def publish(self, deliveries, tx=None):
        os._exit(9)


class Dying:
    name = "source"

    dispatch = EventDispatcher()

    @once
    def send(self):
        # until the broker is known to be there, others may take what is stored and publish it
        while True:
            self.dispatch("unit.sent", {"n": int(os.environ["NUMBER"])})
            eventlet.sleep(0.1)
