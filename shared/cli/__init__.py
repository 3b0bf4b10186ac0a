"""``queuectl``: the queue from the command line."""

from shared.cli.commands import main

__all__ = ["main"]
