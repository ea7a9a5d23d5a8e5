"""LoRA files of other programs, and b2ray's own exports, as the arrays that a policy binds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from b2ray.config import Lora
from b2ray.diffusion.lora_export import DOWN, UP
from b2ray.diffusion.lora_file import FILE, State
from b2ray.errors import ConfigError

# What is no plain low-rank update: weights beside it, or another factorisation.
OTHERS = ("dora_scale", "lora_magnitude_vector", "lora_mid", "hada_", "lokr_", "lora_bias")
# Blocks of a level in every UNet of Stable Diffusion and SDXL: diffusers wants to know it, to give
# SDXL's own module names theirs.
UNET = SimpleNamespace(layers_per_block=2)


def read_lora(path: Path) -> tuple[State, Lora]:
    """A LoRA of a UNet in diffusers' or kohya-ss/sd-scripts' format, by diffusers' own conversion.

    Modules may have different ranks and scales: then the arrays are filled up with zeros to the
    largest rank, and each scale is put into its B, so that one rank and alpha fit all.

    Args:
        path: a .safetensors file, or a folder with one.

    Returns:
        The arrays under the names of `lora_file.load`, float32, and the adapter they fit.

    Raises:
        ConfigError: it cannot be read, is in no known format, or is more than a LoRA of a UNet.
    """
    file = find_file(path)
    try:
        with safe_open(file, "pt") as opened:
            notes = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {error}") from error
    other = next((name for name in tensors if any(word in name for word in OTHERS)), None)
    if other:
        raise ConfigError(f"{file} is no plain LoRA: it has {other!r}, which b2ray does not load")
    matrices, alphas = _converted(file, tensors)
    settings = _settings(file, notes)
    return _uniform(file, matrices, lambda module, rank: _alpha(module, rank, alphas, settings))


def find_file(path: Path) -> Path:
    """The LoRA's file, if a folder is given.

    Raises:
        ConfigError: there is none, there are several, or it is no .safetensors file.
    """
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) > 1 and path / FILE in found:
            return path / FILE
        if len(found) != 1:
            count = f"{len(found)} .safetensors files" if found else "no .safetensors file"
            raise ConfigError(f"{path} has {count}: give the LoRA's file")
        return found[0]
    if not path.is_file():
        raise ConfigError(f"there is no LoRA {str(path)!r}: give a .safetensors file or its folder")
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path} is no .safetensors file; pickled weights run code when they are loaded, "
            "convert them first where you trust them"
        )
    return path


def _converted(
    file: Path, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The update's matrices under diffusers' present names, and the alphas that the file has."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    unknown = ConfigError(
        f"{file} is no LoRA that b2ray knows: diffusers' and kohya-ss/sd-scripts' names are read"
    )
    try:
        # XL's conversion is 1.x and 2.x's, too, and has SDXL's own module names besides.
        found, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=UNET)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise unknown from error
    text = next((name for name in found if name.startswith("text_encoder")), None)
    if text:
        raise ConfigError(
            f"{file} changes the text encoder, too ({text!r}), and b2ray loads the UNet's part "
            "alone, which would not be the LoRA: train or export it without the text encoder"
        )
    mine = {k.removeprefix("unet."): v for k, v in found.items() if k.startswith("unet.")}
    matrices = convert_unet_state_dict_to_peft(mine)
    if not matrices or len(mine) < len(found):
        raise unknown
    if not all(name.endswith((DOWN, UP)) for name in matrices):
        raise unknown
    named = {k.removeprefix("unet."): float(v) for k, v in (alphas or {}).items()}
    return matrices, convert_unet_state_dict_to_peft(named)


def _settings(file: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    """The adapter's settings as diffusers writes them beside the tensors, if it did."""
    try:
        found = json.loads(notes.get("lora_adapter_metadata", "{}"))
        settings = {k[5:]: v for k, v in found.items() if k.startswith("unet.")}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} has settings that are no JSON object: {error}") from error
    for field in ("use_dora", "use_rslora", "lora_bias"):
        if settings.get(field):
            raise ConfigError(f"{file} is no plain LoRA: it has {field}, which b2ray does not load")
    return settings


def _alpha(
    module: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> float:
    """A module's alpha; where nothing says it, its rank, as diffusers has it."""
    own = f"{module}{DOWN}.alpha"
    if own in alphas:
        return alphas[own]
    pattern = settings.get("alpha_pattern") or {}
    named = next((a for name, a in pattern.items() if f".{module}".endswith(f".{name}")), None)
    return float(settings.get("lora_alpha", rank) if named is None else named)


def _uniform(file: Path, matrices: Mapping[str, torch.Tensor], alpha_of: Any) -> tuple[State, Lora]:
    """One rank and alpha for all modules; what has them already is not touched."""
    modules = sorted({name.removesuffix(DOWN).removesuffix(UP) for name in matrices})
    alone = next((m for m in modules if not {m + DOWN, m + UP} <= matrices.keys()), None)
    if alone:
        raise ConfigError(f"{file} has only one of the two matrices of {alone}")
    ranks = {m: len(matrices[m + DOWN]) for m in modules}
    alphas = {m: alpha_of(m, ranks[m]) for m in modules}
    rank = max(ranks.values())
    same = len(set(ranks.values())) == len(set(alphas.values())) == 1 and min(alphas.values()) > 0
    alpha = next(iter(alphas.values())) if same else float(rank)
    weights = {}
    for m in modules:
        down, up = matrices[m + DOWN].float(), matrices[m + UP].float()
        if not same:
            missing = rank - ranks[m]
            down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
            up = up * (alphas[m] / ranks[m])
            up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1)
        weights[m + DOWN], weights[m + UP] = down.numpy(), up.numpy()
    return weights, Lora(rank=rank, alpha=alpha, targets=tuple(modules))
