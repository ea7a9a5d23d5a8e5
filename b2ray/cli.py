"""The console script: `b2ray COMMAND …`."""

from __future__ import annotations

import importlib
import os
import sys

from b2ray.errors import EXIT_CONFIG, EXIT_DONE

# words → (module with `main(argv)`, imported only when it is asked for; what it does)
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
    "shapes build": ("b2ray.shapes.build.__main__", "train the embedded model from scratch"),
}
USAGE = "usage: b2ray COMMAND …\n\n{}\n\nb2ray COMMAND --help says more.\n".format(
    "\n".join(f"  {words:14} {line}" for words, (_, line) in COMMANDS.items())
)


def main() -> int:
    """Dispatch to the command that is named first."""
    words = sys.argv[1:]
    for count in (1, 2):
        if " ".join(words[:count]) in COMMANDS:
            module, _ = COMMANDS[" ".join(words[:count])]
            # As with `python -m`: your own reward is found in the working directory.
            sys.path.insert(0, os.getcwd())
            return int(importlib.import_module(module).main(words[count:]))
    if words in ([], ["-h"], ["--help"], ["help"]):
        print(USAGE, end="")
        return EXIT_DONE
    print(f"b2ray: there is no command {' '.join(words[:2])!r}\n{USAGE}", end="", file=sys.stderr)
    return EXIT_CONFIG
