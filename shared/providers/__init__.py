"""Providers move deliveries; the settings name one. None is guessed from what is installed."""

from importlib import import_module
from inspect import isabstract

from shared.errors import SettingsError
from shared.providers.base import Capabilities, QueueProvider, SubscriptionStats
from shared.providers.rpc import RpcMessage, RpcTransport
from shared.settings import Settings

__all__ = [
    "Capabilities",
    "QueueProvider",
    "RpcMessage",
    "RpcTransport",
    "SubscriptionStats",
    "check_provider",
    "make_provider",
    "provider_class",
]

_CLASSES = {
    "embedded": "shared.providers.embedded:EmbeddedProvider",
    "redis": "shared.providers.redis:RedisProvider",
    "rabbitmq": "shared.providers.rabbitmq:RabbitMQProvider",
}


def provider_class(settings: Settings) -> type[QueueProvider]:
    """Return the class of the provider that the settings name.

    :raises SettingsError: when it is none.
    """
    module, _, name = _CLASSES.get(settings.provider, settings.provider).partition(":")
    found = getattr(import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, QueueProvider)):
        raise SettingsError(f"QUEUE_PROVIDER: {settings.provider} must be a QueueProvider")
    return found


def check_provider(settings: Settings) -> None:
    """See that the settings name a provider, which can do what they ask of it.

    :raises SettingsError: when not.
    """
    kind = provider_class(settings)
    if isabstract(kind):
        lack = ", ".join(sorted(kind.__abstractmethods__))
        raise SettingsError(f"QUEUE_PROVIDER: {settings.provider} must have the methods {lack}")
    if not settings.log and not kind(settings).capabilities.fans_out:
        raise SettingsError(
            f"QUEUE_LOG: must be on where QUEUE_PROVIDER is {settings.provider}, which does not "
            "know by itself who subscribed"
        )


def make_provider(settings: Settings) -> QueueProvider:
    """Make the provider that the settings name; it connects in ``initialize``."""
    return provider_class(settings)(settings)
