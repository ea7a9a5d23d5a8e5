"""`b2ray export`: a run's LoRA as a file or folder that other programs read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b2ray.commands.common import (
    Parser,
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
    """Run the command; returns the exit code of `b2ray.errors`."""
    return execute(make_parser(), export, argv)


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Write one format.

    Raises:
        ConfigError: the run, the base model or the disk does not allow it.
    """
    if args.format not in FORMATS:
        names = ", ".join(FORMATS)
        raise ConfigError(f"--format is {args.format!r}: the formats are {names}")
    found = find_trained(args.run, args.runs, args.stage)
    output = _output(found, args.format, args.output)
    refuse_existing(output, args.force)
    import torch  # after what can be refused without it

    dtype = getattr(torch, args.dtype)
    if args.format == "merged":
        _merged(found, dtype, output)
    else:
        _lora(found, args.format, dtype, output)
    print(f"{found}, {args.dtype}: {output}")
    print(FORMATS[args.format].format(output=str(output), dtype=args.dtype))
    return {**found.named(), "format": args.format, "dtype": args.dtype, "output": str(output)}


def _output(found: Trained, form: str, given: str | None) -> Path:
    """Where the file or folder goes; a LoRA file gets a name if a folder is given."""
    target = Path(given).expanduser() if given else found.path / "export" / form
    if form == "merged" or target.suffix == ".safetensors":
        return target
    return target / (FILE if form == "diffusers" else f"{found.config.name}.safetensors")


def _lora(found: Trained, form: str, dtype: torch.dtype, output: Path) -> None:
    from b2ray.diffusion import lora_export

    settings, name = found.config.model.lora, found.config.name
    if form == "kohya":
        content = lora_export.kohya(found.weights, settings, dtype, name)
    else:
        content = lora_export.diffusers(found.weights, settings, dtype)
    place(output, lambda part: part.write_bytes(content))


def _merged(found: Trained, dtype: torch.dtype, output: Path) -> None:
    from b2ray.diffusion import lora_export
    from b2ray.diffusion.load import load_pipeline

    quiet()
    model = found.config.model
    # Fused in single precision, then cast.
    pipeline, _ = load_pipeline(model.model_copy(update={"dtype": "float32"}))
    lora_export.merge(pipeline.unet, found.weights, model.lora, dtype)
    pipeline.to(dtype=dtype)
    place(output, lambda part: pipeline.save_pretrained(part, safe_serialization=True))


def make_parser() -> argparse.ArgumentParser:
    formats = "\n".join(
        f"  {name:10} {text.format(output='PATH', dtype='DTYPE')}" for name, text in FORMATS.items()
    )
    parser = Parser(
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
