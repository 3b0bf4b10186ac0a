"""The message log and what belongs to it."""

from shared.store.session import DatabaseSession

__all__ = ["DatabaseSession"]
