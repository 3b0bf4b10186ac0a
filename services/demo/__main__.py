"""``python -m services.demo [run]``."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType

from services.demo import run, story


def main() -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.demo", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=["demo", "run"],
        default="demo",
        help="demo: sign people up, and show what became of each event (default); "
        "run: start the services and leave them running until Ctrl-C",
    )
    what = parser.parse_args().what
    _end_like_ctrl_c(signal.SIGTERM, signal.SIGHUP)
    # in a terminal of another encoding, people's names show with question marks
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    return run.main() if what == "run" else story.main()


def _end_like_ctrl_c(*signals: signal.Signals) -> None:
    for each in signals:
        if signal.getsignal(each) is not signal.SIG_IGN:  # nohup
            signal.signal(each, _interrupt)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
