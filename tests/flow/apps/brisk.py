"""The recorder, in a process that looks often for what is to be published."""

from shared.events import apart
from tests.flow.apps.recorder import Recorder

apart.SWEEP_SECONDS = 0.3

__all__ = ["Recorder"]
