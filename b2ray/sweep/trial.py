"""The process of one trial: an ordinary run that stops, resumably, when its standard input ends.

The sweep holds the other end. A signal would not do: `ray job stop` sends one to every process of
the job, and of two a run takes the second as the wish to end at once. And a sweep that is killed
sends none, but leaves an end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from b2ray import run
from b2ray.errors import EXIT_STOPPED


def main() -> int:
    """Run with the arguments of the command line; returns the exit code of `b2ray.errors`."""
    # A shell without a terminal has what it starts in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=_watch, daemon=True).start()
        return run.main()
    except KeyboardInterrupt:  # before the run has taken the signals over
        return EXIT_STOPPED


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    # Not SIGTERM, which the run may have had already.
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
