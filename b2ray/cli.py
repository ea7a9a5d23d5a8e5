"""The console script `b2ray COMMAND …`, and the only place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from b2ray.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_WORKER,
    ConfigError,
    Stopped,
    WorkerError,
)

# Name → (the module whose `main(argv)` is the command, imported when it is called; a description).
COMMANDS = {
    "run": ("b2ray.run", "fine-tune a model (as python -m b2ray.run)"),
    "check": ("b2ray.commands.check", "look a configuration over before it is run"),
    "evaluate": ("b2ray.commands.evaluate", "score a LoRA beside its base model or another one"),
    "sample": ("b2ray.commands.sample", "draw pictures with and without a run's LoRA"),
    "export": ("b2ray.commands.export", "write a run's LoRA for diffusers, ComfyUI, AUTOMATIC1111"),
    "report": ("b2ray.commands.report", "write a run's page: figures, pictures, branch trees"),
    "watch": ("b2ray.commands.watch", "serve a run's page while the run goes on"),
    "completion": (
        "b2ray.commands.completion",
        "print a script that lets a shell complete all this",
    ),
}
USAGE = "usage: b2ray COMMAND …\n\n{}\n\nb2ray COMMAND --help says more.\n".format(
    "\n".join(f"  {name:14} {line}" for name, (_, line) in COMMANDS.items())
)


def main() -> int:
    """Run the command that the first argument names, and return its exit code."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        module, _ = COMMANDS[words[0]]
        # As `python -m` does, so that the user's rewards are imported from the working directory.
        sys.path.insert(0, os.getcwd())
        return int(importlib.import_module(module).main(words[1:]))
    if words in ([], ["-h"], ["--help"], ["help"]):
        print(USAGE, end="")
        return EXIT_DONE
    print(f"b2ray: there is no command {words[0]!r}\n{USAGE}", end="", file=sys.stderr)
    return EXIT_CONFIG


def guarded(action: Callable[[], int], on_error: Callable[[str], object] = lambda _: None) -> int:
    """Call a function, and turn an error that a user can act on into a sentence and an exit code.

    The sentence is printed to standard error, followed by the notes that were added to the error.

    Args:
        action: the function, which returns an exit code.
        on_error: called with the sentence and its notes.

    Returns:
        The exit code of the action or of the error, one of `b2ray.errors`.
    """
    try:
        return action()
    except (ConfigError, WorkerError, Stopped, OSError, KeyboardInterrupt) as error:
        sentence = "\n".join([_sentence(error), *getattr(error, "__notes__", ())])
        print(f"b2ray: {sentence}", file=sys.stderr)
        on_error(sentence)
        return _exit_code(error)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError):  # a full disk or a read-only folder, for example
        return f"{error.filename or 'a file'} cannot be used: {error.strerror or error}"
    return "stopped" if isinstance(error, KeyboardInterrupt) else str(error)


def _exit_code(error: BaseException) -> int:
    codes = {WorkerError: EXIT_WORKER, Stopped: EXIT_STOPPED, KeyboardInterrupt: EXIT_STOPPED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_CONFIG)
