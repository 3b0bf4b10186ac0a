"""Providers move deliveries; the settings name one. None is guessed from what is installed."""

from dataclasses import replace
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
    "draining_class",
    "draining_settings",
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


def draining_settings(settings: Settings) -> Settings:
    """Return the settings by which the provider is used that is moved away from."""
    return replace(settings, provider=settings.drain, drain="")


def draining_class(settings: Settings) -> type[QueueProvider]:
    """Return the class of the provider that is moved away from."""
    return provider_class(draining_settings(settings))


def check_provider(settings: Settings) -> None:
    """See that the settings name a provider, which can do what they ask of it.

    :raises SettingsError: when not.
    """
    kind = _complete(settings)
    if settings.drain and _complete(draining_settings(settings)).capabilities.joins_log:
        _refuse_two_in_log(settings, kind)
    if not settings.log and not kind(settings).capabilities.fans_out:
        raise SettingsError(
            f"QUEUE_LOG: must be on where QUEUE_PROVIDER is {settings.provider}, which does not "
            "know by itself who subscribed"
        )


def _complete(settings: Settings) -> type[QueueProvider]:
    kind = provider_class(settings)
    if isabstract(kind):
        lack = ", ".join(sorted(kind.__abstractmethods__))
        raise SettingsError(f"QUEUE_PROVIDER: {settings.provider} must have the methods {lack}")
    return kind


def _refuse_two_in_log(settings: Settings, kind: type[QueueProvider]) -> None:
    if kind.capabilities.joins_log:
        raise SettingsError(
            f"QUEUE_PROVIDER_DRAIN: {settings.drain} works in the tables that "
            f"{settings.provider} works in: there is nothing to move"
        )


def make_provider(settings: Settings) -> QueueProvider:
    """Make the provider that the settings name; it connects in ``initialize``."""
    return provider_class(settings)(settings)
