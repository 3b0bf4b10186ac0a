"""``queuectl``: the queue from the command line."""

import warnings

# nameko needs eventlet, and whoever runs this command can do nothing about it
warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")

from shared.cli.commands import main  # noqa: E402

__all__ = ["main"]
