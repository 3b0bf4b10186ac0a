"""RPC by a list a queue, which expires with the last message that somebody waits for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import monotonic

from shared.providers.redis.connected import Connected
from shared.providers.redis.scripts import script
from shared.providers.redis.servers import preload
from shared.providers.redis.wire import Command, Keys, milliseconds
from shared.providers.rpc import RpcMessage, RpcTransport, wake_id
from shared.settings import Settings

NOT_DECLARED = -2
"""What ``lua/rpc_send.lua`` returns for a queue that nobody ever took from."""


class RedisRpc(Connected, RpcTransport):
    """See the module's docstring."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        preload()
        self._keys = Keys(settings.redis_prefix)
        # each queue, and whether it is a lasting one
        self._declared: dict[str, bool] = {}

    def initialize(self) -> None:
        self._connect_anew()

    def close(self) -> None:
        self._disconnect()

    def declare(self, queue: str, *, lasting: bool) -> None:
        self._declared[queue] = lasting
        self._connect()
        key = self._keys.rpc(queue)[0]
        self._run([Command(key, ("SET", key, 1))] if lasting else [])

    def send(self, messages: Sequence[RpcMessage]) -> list[RpcMessage]:
        groups: dict[tuple[str, bool], list[RpcMessage]] = {}
        for message in messages:
            groups.setdefault((message.queue, message.mandatory), []).append(message)
        answers = self._run([self._sending(*key, its) for key, its in groups.items()])
        answered = zip(groups.values(), answers, strict=True)
        return [x for its, answer in answered if answer == NOT_DECLARED for x in its]

    def take(self, limits: Mapping[str, int]) -> list[RpcMessage]:
        self._connect()
        self._hear()
        answers = self._run([self._taking(*each) for each in limits.items()])
        return [
            RpcMessage(queue, body, ttl / 1000)
            for queue, answer in zip(limits, answers, strict=True)
            for ttl, body in zip(answer[::2], answer[1::2], strict=True)
        ]

    def wait(self, timeout: float, interrupt: int, queues: Iterable[str]) -> None:
        if self._listener is None:
            return  # deaf: the next take listens again, or says what is wrong
        with self._deaf_on_errors():
            self._listener.wait(monotonic() + timeout, interrupt, set(map(wake_id, queues)))

    def _channels(self) -> set[str]:
        return set(map(self._keys.rpc_channel, self._declared))

    def _sending(self, queue: str, mandatory: bool, sent: Sequence[RpcMessage]) -> Command:
        keys, channel = self._keys.rpc(queue), self._keys.rpc_channel(queue)
        args = [value for each in sent for value in (max(milliseconds(each.ttl), 1), each.body)]
        return script("rpc_send", keys, channel, wake_id(queue), int(mandatory), *args)

    def _taking(self, queue: str, most: int) -> Command:
        lasting = int(self._declared.get(queue, False))
        return script("rpc_take", self._keys.rpc(queue), most, lasting)
