"""Reading of LoRA files that b2ray or another program wrote, as arrays that a policy can bind."""

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

# Parts of tensor names in files that hold more than a low-rank update, or another factorisation.
UNSUPPORTED = ("dora_scale", "lora_magnitude_vector", "lora_mid", "hada_", "lokr_", "lora_bias")
# The number of blocks per level in every UNet of Stable Diffusion and SDXL: diffusers needs it to
# translate SDXL's own module names.
UNET_CONFIG = SimpleNamespace(layers_per_block=2)


def read_lora(path: Path) -> tuple[State, Lora]:
    """Read a LoRA of a UNet in diffusers' or kohya-ss/sd-scripts' format.

    diffusers converts the names. If modules have different ranks and scales, the arrays are padded
    with zeros to the largest rank and each B is multiplied by its scale, so that one rank and one
    alpha fit all modules.

    Args:
        path: a .safetensors file, or a folder that contains one.

    Returns:
        The values by the names of `lora_file.load`, float32, and the settings of their adapter.

    Raises:
        ConfigError: the file cannot be read, has no known format, or is more than a LoRA of a UNet.
    """
    file = find_file(path)
    try:
        with safe_open(file, "pt") as stored:
            notes = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {error}") from error
    unsupported = (name for name in tensors if any(part in name for part in UNSUPPORTED))
    first = next(unsupported, None)
    if first:
        raise ConfigError(f"{file} is no plain LoRA: it has {first!r}, which b2ray does not load")
    matrices, alphas = _converted(file, tensors)
    settings = _settings(file, notes)
    return _uniform(file, matrices, lambda module, rank: _alpha(module, rank, alphas, settings))


def find_file(path: Path) -> Path:
    """The path of a LoRA's file, which may be given by its folder.

    Raises:
        ConfigError: there is no such file, the folder has several, or it is no .safetensors file.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) > 1 and path / FILE in files:
            return path / FILE
        if len(files) != 1:
            count = f"{len(files)} .safetensors files" if files else "no .safetensors file"
            raise ConfigError(f"{path} has {count}: give the LoRA's file")
        return files[0]
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
    """The A and B matrices and the file's alphas, both by diffusers' current names."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    unknown = ConfigError(
        f"{file} is no LoRA that b2ray knows: diffusers' and kohya-ss/sd-scripts' names are read"
    )
    try:
        # SDXL's conversion does what that of 1.x and 2.x does, and also knows SDXL's own names.
        renamed, alphas = StableDiffusionXLPipeline.lora_state_dict(
            dict(tensors), unet_config=UNET_CONFIG
        )
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise unknown from error
    of_text_encoder = next((name for name in renamed if name.startswith("text_encoder")), None)
    if of_text_encoder:
        raise ConfigError(
            f"{file} changes the text encoder, too ({of_text_encoder!r}), and b2ray loads the "
            "UNet's part alone, which would not be the LoRA: train or export it without the text "
            "encoder"
        )
    of_unet = {k.removeprefix("unet."): v for k, v in renamed.items() if k.startswith("unet.")}
    matrices = convert_unet_state_dict_to_peft(of_unet)
    if not matrices or len(of_unet) < len(renamed):
        raise unknown
    if not all(name.endswith((DOWN, UP)) for name in matrices):
        raise unknown
    unet_alphas = {k.removeprefix("unet."): float(v) for k, v in (alphas or {}).items()}
    return matrices, convert_unet_state_dict_to_peft(unet_alphas)


def _settings(file: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    """The adapter's settings from the metadata that diffusers writes; empty if there are none."""
    try:
        adapter = json.loads(notes.get("lora_adapter_metadata", "{}"))
        settings = {k[5:]: v for k, v in adapter.items() if k.startswith("unet.")}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{file} has settings that are no JSON object: {error}") from error
    for field in ("use_dora", "use_rslora", "lora_bias"):
        if settings.get(field):
            raise ConfigError(f"{file} is no plain LoRA: it has {field}, which b2ray does not load")
    return settings


def _alpha(
    module: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> float:
    """A module's alpha; its rank if the file does not give one, as in diffusers."""
    key = f"{module}{DOWN}.alpha"
    if key in alphas:
        return alphas[key]
    patterns = (settings.get("alpha_pattern") or {}).items()
    matching = next((a for name, a in patterns if f".{module}".endswith(f".{name}")), None)
    return float(settings.get("lora_alpha", rank) if matching is None else matching)


def _uniform(file: Path, matrices: Mapping[str, torch.Tensor], alpha_of: Any) -> tuple[State, Lora]:
    """Give all modules the same rank and alpha; if they have that already, nothing changes."""
    modules = sorted({name.removesuffix(DOWN).removesuffix(UP) for name in matrices})
    incomplete = next((m for m in modules if not {m + DOWN, m + UP} <= matrices.keys()), None)
    if incomplete:
        raise ConfigError(f"{file} has only one of the two matrices of {incomplete}")
    ranks = {m: len(matrices[m + DOWN]) for m in modules}
    alphas = {m: alpha_of(m, ranks[m]) for m in modules}
    rank = max(ranks.values())
    uniform = (
        len(set(ranks.values())) == len(set(alphas.values())) == 1 and min(alphas.values()) > 0
    )
    alpha = next(iter(alphas.values())) if uniform else float(rank)
    weights = {}
    for m in modules:
        down, up = matrices[m + DOWN].float(), matrices[m + UP].float()
        if not uniform:
            missing = rank - ranks[m]
            down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
            up = up * (alphas[m] / ranks[m])
            up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1)
        weights[m + DOWN], weights[m + UP] = down.numpy(), up.numpy()
    return weights, Lora(rank=rank, alpha=alpha, targets=tuple(modules))
