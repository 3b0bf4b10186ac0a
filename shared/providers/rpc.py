"""What carries RPC: requests to services, and replies to who called.

Unlike an event, a request is of no use once its caller has given up. So nothing here is
logged, leased or done again: a message is handed to one taker, once, and one that nobody
takes within its time is gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

from shared.settings import Settings


@dataclass(frozen=True, slots=True, eq=False)
class RpcMessage:
    """A request or a reply.

    :param queue: of the service, which all its instances take from, or of one caller.
    :param ttl: seconds until nobody waits for it any more.
    :param mandatory: whether it is refused where nobody ever declared the queue.
    """

    queue: str
    body: str
    ttl: float
    mandatory: bool = False


class RpcTransport(ABC):
    """The interface. One native thread uses and closes an instance.

    Everything that can fail raises a :class:`~shared.errors.ProviderError` and no
    driver's exception.
    """

    in_log: bool = False
    """It works in the database of the message log, whose tables have to be there."""

    def __init__(self, settings: Settings) -> None:
        """Keep the settings. No connection is made here."""
        self.settings = settings

    @abstractmethod
    def initialize(self) -> None:
        """Connect; again after a lost connection.

        :raises ProviderUnavailableError: when the server does not answer.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of every connection and file. Never raises."""

    @abstractmethod
    def declare(self, queue: str, *, lasting: bool) -> None:
        """Get woken for a queue.

        :param lasting: from now on it takes ``mandatory`` messages, whether or not
            somebody is there.
        """

    @abstractmethod
    def send(self, messages: Sequence[RpcMessage]) -> list[RpcMessage]:
        """Send messages, in their order, and wake who takes them; return the refused ones."""

    @abstractmethod
    def take(self, limits: Mapping[str, int]) -> list[RpcMessage]:
        """Take what is there and not yet over, oldest first, each with the ttl it has left.

        :param limits: the most for each queue.
        """

    @abstractmethod
    def wait(self, timeout: float, interrupt: int, queues: Iterable[str]) -> None:
        """Wait until one of these queues may have something; may return sooner.

        :param timeout: seconds at most.
        :param interrupt: a file descriptor; readable means that the waiting ends.
        """


def wake_id(queue: str) -> int:
    """Return the number that wakes who takes from a queue; two with one wake each other in vain."""
    return crc32(queue.encode())
