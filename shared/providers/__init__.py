"""Providers move deliveries; the settings name one. None is guessed from what is installed."""

from importlib import import_module

from shared.providers.base import Capabilities, QueueProvider, SubscriptionStats
from shared.settings import Settings

__all__ = ["Capabilities", "QueueProvider", "SubscriptionStats", "make_provider"]

_CLASSES = {"embedded": "shared.providers.embedded:EmbeddedProvider"}


def make_provider(settings: Settings) -> QueueProvider:
    """Make the provider that the settings name; it connects in ``initialize``."""
    module, _, name = _CLASSES.get(settings.provider, settings.provider).partition(":")
    provider: QueueProvider = getattr(import_module(module), name)(settings)
    return provider
