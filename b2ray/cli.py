"""The console script: `b2ray run …` and `b2ray shapes build …`."""

from __future__ import annotations

import os
import sys

from b2ray.errors import EXIT_CONFIG, EXIT_DONE

USAGE = """usage: b2ray COMMAND …

  run            fine-tune a model (as python -m b2ray.run; --help lists every field)
  shapes build   train the embedded model from scratch (as python -m b2ray.shapes.build)
"""


def main() -> int:
    """Dispatch to the command that is named first."""
    words = sys.argv[1:]
    if words[:1] == ["run"]:
        from b2ray.run import main as run

        # As with `python -m`: your own reward is found in the working directory.
        sys.path.insert(0, os.getcwd())
        return run(words[1:])
    if words[:2] == ["shapes", "build"]:
        from b2ray.shapes.build.__main__ import main as build

        return build(words[2:])
    if words in ([], ["-h"], ["--help"], ["help"]):
        print(USAGE, end="")
        return EXIT_DONE
    print(f"b2ray: there is no command {' '.join(words[:2])!r}\n{USAGE}", end="", file=sys.stderr)
    return EXIT_CONFIG
