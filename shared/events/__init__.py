"""Dispatching and handling events: a drop-in for the same names of ``nameko.events``."""

from nameko.events import BROADCAST, SERVICE_POOL, SINGLETON

from shared.events.context import Message, MessageContext
from shared.events.dispatcher import Dispatch, EventDispatcher
from shared.events.handler import EventHandler, event_handler
from shared.events.operations import MessageLog, QueueService
from shared.events.repairs import QueueOperations
from shared.lifecycle import Backoff

__all__ = [
    "BROADCAST",
    "SERVICE_POOL",
    "SINGLETON",
    "Backoff",
    "Dispatch",
    "EventDispatcher",
    "EventHandler",
    "Message",
    "MessageContext",
    "MessageLog",
    "QueueOperations",
    "QueueService",
    "event_handler",
]
