"""`b2ray export`: writes a run's LoRA as a file or folder that other programs can read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b2ray.commands.common import (
    CommandParser,
    add_json,
    add_run,
    execute,
    place,
    quiet,
    refuse_existing,
)
from b2ray.diffusion.lora_file import FILE
from b2ray.errors import ConfigError
from b2ray.tracking.trained import Trained, find_trained

if TYPE_CHECKING:
    import torch

FORMATS = {
    "diffusers": "a LoRA file: pipeline.load_lora_weights({output!r})",
    "kohya": "a LoRA file for ComfyUI's models/loras or AUTOMATIC1111's models/Lora",
    "merged": "a pipeline: DiffusionPipeline.from_pretrained({output!r}, dtype=torch.{dtype})",
}


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code, one of `b2ray.errors`."""
    return execute(make_parser(), export, argv)


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Write the LoRA in one format, say where, and return what --json prints.

    Raises:
        ConfigError: an option is wrong, there is no such run, its base model cannot be loaded, or
            the output cannot be written.
    """
    if args.format not in FORMATS:
        names = ", ".join(FORMATS)
        raise ConfigError(f"--format is {args.format!r}: the formats are {names}")
    trained = find_trained(args.run, args.runs, args.stage)
    output = _output(trained, args.format, args.output)
    refuse_existing(output, args.force)
    import torch  # only now, because it is slow and all errors above do without it

    dtype = getattr(torch, args.dtype)
    if args.format == "merged":
        _merged(trained, dtype, output)
    else:
        _lora(trained, args.format, dtype, output)
    print(f"{trained}, {args.dtype}: {output}")
    print(FORMATS[args.format].format(output=str(output), dtype=args.dtype))
    return {**trained.named(), "format": args.format, "dtype": args.dtype, "output": str(output)}


def _output(trained: Trained, form: str, option: str | None) -> Path:
    """Return the file or folder to write; in a folder, a LoRA file gets the format's usual name."""
    target = Path(option).expanduser() if option else trained.path / "export" / form
    if form == "merged" or target.suffix == ".safetensors":
        return target
    return target / (FILE if form == "diffusers" else f"{trained.config.name}.safetensors")


def _lora(trained: Trained, form: str, dtype: torch.dtype, output: Path) -> None:
    from b2ray.diffusion import lora_export

    settings, name = trained.config.model.lora, trained.config.name
    if form == "kohya":
        content = lora_export.kohya(trained.weights, settings, dtype, name)
    else:
        content = lora_export.diffusers(trained.weights, settings, dtype)
    place(output, lambda part: part.write_bytes(content))


def _merged(trained: Trained, dtype: torch.dtype, output: Path) -> None:
    from b2ray.diffusion import lora_export
    from b2ray.diffusion.load import load_pipeline

    quiet()
    model = trained.config.model
    # The LoRA is merged in single precision, and the result is cast.
    pipeline, _ = load_pipeline(model.model_copy(update={"dtype": "float32"}))
    lora_export.merge(pipeline.unet, trained.weights, model.lora, dtype)
    pipeline.to(dtype=dtype)
    place(output, lambda part: pipeline.save_pretrained(part, safe_serialization=True))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    formats = "\n".join(
        f"  {name:10} {text.format(output='PATH', dtype='DTYPE')}" for name, text in FORMATS.items()
    )
    parser = CommandParser(
        prog="b2ray export",
        description="Write a run's LoRA for other programs: the finished one, or that of the last "
        "committed stage of a run that is not finished.",
        epilog=f"formats:\n{formats}",
    )
    add_run(parser)
    parser.add_argument("--format", required=True, metavar="|".join(FORMATS), help="see below")
    parser.add_argument(
        "--output", metavar="PATH", help="a .safetensors file, or a folder (default: RUN/export/…)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float32",
        help="precision of what is written (default: float32, exact)",
    )
    parser.add_argument("--force", action="store_true", help="replace what is at the output")
    add_json(parser)
    return parser
