"""The provider on RabbitMQ, with exchanges and queues as plain nameko has them.

An event is one message for the topic exchange ``<source>.events``, whoever listens there:
a handler of ours, or one of plain nameko's. Its body is the bare payload, and all that is
ours is in headers. docs/rabbitmq.md describes the layout.

It speaks through py-amqp, which is kombu's own driver, by two connections: RabbitMQ stops
those that publish when it runs out of memory, and what is handled meanwhile has to be
acknowledged. Frames are gathered and sent together, and answers read as they come, so that
a thousand messages take one round trip.

Sockets are eventlet's, as for whatever else is imported after monkey patching: in a native
thread they wait by a hub of that thread's own.
"""

from shared.providers.rabbitmq.provider import RabbitMQProvider

__all__ = ["RabbitMQProvider"]
