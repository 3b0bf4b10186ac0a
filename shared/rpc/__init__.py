"""RPC: nameko's own over RabbitMQ, and the same calls and errors over the other providers."""

from nameko.exceptions import (
    IncorrectSignature,
    MalformedRequest,
    MethodNotFound,
    RemoteError,
    UnknownService,
    UnserializableValueError,
)

from shared.errors import RpcTimeoutError
from shared.rpc.entrypoint import Rpc, rpc
from shared.rpc.proxy import RpcProxy, RpcReply

__all__ = [
    "IncorrectSignature",
    "MalformedRequest",
    "MethodNotFound",
    "RemoteError",
    "Rpc",
    "RpcProxy",
    "RpcReply",
    "RpcTimeoutError",
    "UnknownService",
    "UnserializableValueError",
    "rpc",
]
