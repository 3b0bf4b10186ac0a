"""Requests and replies as text.

The outside is plain JSON, so that whoever gets one can always say what is wrong with it.
Within is what kombu's serializer makes of arguments and results, which over RabbitMQ is
nameko's default: it takes dates, decimals, UUIDs and bytes, and gives them back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import kombu.serialization
from nameko.exceptions import MalformedRequest, UnserializableValueError, serialize
from nameko.rpc import RPC_QUEUE_TEMPLATE

from shared.errors import PayloadError
from shared.providers import RpcMessage

SHORTENED_CHARACTERS = 1000
"""What is left of the text of an error that is larger than a reply may be."""


def queue_of(service: str) -> str:
    """Return the queue that the instances of a service take requests from."""
    queue: str = RPC_QUEUE_TEMPLATE.format(service)
    return queue


_OUTSIDE = ("correlation_id", "reply_to", "method", "content")


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was taken.

    :param deadline: a monotonic time, after which nobody waits for the reply.
    """

    message: RpcMessage
    deadline: float
    correlation_id: str
    reply_to: str
    method: str
    content: str
    headers: dict[str, Any] = field(default_factory=dict)
    """What nameko looks for them on; filled by :meth:`read`."""

    @classmethod
    def of(cls, message: RpcMessage) -> Request:
        """Read the outside of a request.

        :raises MalformedRequest: when that is not possible.
        """
        try:
            outside = json.loads(message.body)
            values: dict[str, Any] = {name: str(outside[name]) for name in _OUTSIDE}
        except (ValueError, TypeError, LookupError, RecursionError) as exc:
            raise MalformedRequest(f"is no request: {exc!r}") from exc
        return cls(message, monotonic() + message.ttl, **values)

    def read(self) -> Mapping[str, Any]:
        """Return the arguments, under the names that nameko gives them.

        :raises MalformedRequest: when they cannot be read.
        """
        try:
            content = _decoded(self.content)
            self.headers.update(content.pop("headers", {}))
        except Exception as exc:  # whatever decoding may raise
            raise MalformedRequest(f"arguments cannot be read: {exc!r}") from exc
        return dict(content)


def request_body(
    correlation_id: str, reply_to: str, method: str, content: Mapping[str, Any], most_bytes: int
) -> str:
    """Return a request as text.

    :param content: ``args``, ``kwargs`` and ``headers``.
    :raises kombu.exceptions.EncodeError: when one cannot be serialized, as over RabbitMQ.
    :raises PayloadError: when they have more than ``most_bytes``.
    """
    return json.dumps(
        {
            "correlation_id": correlation_id,
            "reply_to": reply_to,
            "method": method,
            "content": _within(_encoded(content), most_bytes, "arguments"),
        }
    )


def reply_content(result: Any, error: BaseException | None, most_bytes: int) -> tuple[str, Any]:
    """Return the content of a reply, and what is wrong with the result or ``None``."""
    if error is not None:
        return _error_content(error, most_bytes), None
    try:
        content = _encoded({"result": result, "error": None})
        return _within(content, most_bytes, "result"), None
    except PayloadError as exc:
        wrong: Exception = exc
    except Exception:  # whatever encoding may raise
        wrong = UnserializableValueError(result)
    return _error_content(wrong, most_bytes), wrong


def reply_body(correlation_id: str, content: str) -> str:
    """Return a reply as text."""
    return json.dumps({"correlation_id": correlation_id, "content": content})


def read_reply(message: RpcMessage) -> tuple[str, dict[str, Any]]:
    """Return whose reply a message is, and ``result`` and ``error``."""
    outside = json.loads(message.body)
    try:
        content = _decoded(outside["content"])
    except Exception as exc:  # whatever decoding may raise
        content = {"result": None, "error": serialize(exc)}
    return outside["correlation_id"], content


def _error_content(error: BaseException, most_bytes: int) -> str:
    said = serialize(error)
    content = _encoded({"result": None, "error": said})
    if len(content) > most_bytes:
        shortened = {"exc_args": [], "value": str(said["value"])[:SHORTENED_CHARACTERS]}
        content = _encoded({"result": None, "error": {**said, **shortened}})
    return content


def _encoded(value: Any) -> str:
    _, _, text = kombu.serialization.dumps(value, serializer="json")
    return str(text)


def _decoded(text: str) -> Any:
    return kombu.serialization.loads(text, "application/json", "utf-8", accept={"application/json"})


def _within(text: str, most_bytes: int, what: str) -> str:
    size = len(text.encode())
    if size > most_bytes:
        raise PayloadError({what: f"too large: {size} bytes, and {most_bytes} are allowed"})
    return text
