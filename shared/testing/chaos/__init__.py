"""Faults for handlers: what becomes of the world when an event is handled again."""

from shared.testing.chaos.points import Point
from shared.testing.chaos.report import Report, Unsafe
from shared.testing.chaos.runner import ChaosRunner

__all__ = ["ChaosRunner", "Point", "Report", "Unsafe"]
