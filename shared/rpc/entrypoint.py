"""The entrypoint: a drop-in for nameko's ``rpc``."""

from __future__ import annotations

from typing import Any

from nameko.constants import AMQP_URI_CONFIG_KEY
from nameko.rpc import Rpc as NamekoRpc

from shared.errors import SettingsError
from shared.providers import make_provider
from shared.rpc.client import RpcClient
from shared.settings import refuse_start, settings_or_exit


def is_namekos_own(container: Any) -> bool:
    """Say whether nameko's own RPC speaks to the server of the provider."""
    settings = settings_or_exit(container.config)
    try:
        is_own = make_provider(settings).capabilities.nameko_rpc
    except SettingsError as exc:
        refuse_start(exc)
    if is_own:
        # where nameko looks for it, already while its extensions are bound
        container.config[AMQP_URI_CONFIG_KEY] = settings.rabbitmq_uri
    return is_own


class Rpc(NamekoRpc):
    """Makes a method callable from other services, by :class:`~shared.rpc.RpcProxy`.

    Takes what ``nameko.rpc.Rpc`` takes, and over RabbitMQ is one as soon as it is bound.
    Over the other providers a call is run once at most, and not at all once its caller
    has given up; nothing is run again whose worker was killed.
    """

    rpc_consumer = RpcClient()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._given = args, kwargs
        super().__init__(*args, **kwargs)

    def bind(self, container: Any, method_name: str) -> Any:
        if is_namekos_own(container):
            args, kwargs = self._given
            return NamekoRpc(*args, **kwargs).bind(container, method_name)
        return super().bind(container, method_name)


rpc = Rpc.decorator
