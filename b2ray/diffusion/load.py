"""Loading of a diffusers pipeline from a folder, from the hub, or from a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from b2ray.config import Model
from b2ray.config.paths import find
from b2ray.diffusion import pretrained
from b2ray.diffusion.families import FAMILIES, Family, family
from b2ray.errors import ConfigError


def load_pipeline(model: Model) -> tuple[Any, Family]:
    """Load a pipeline in `model.dtype` on the CPU, without a safety checker.

    Args:
        model: the configuration's section about the model.

    Returns:
        The pipeline and its family.

    Raises:
        ConfigError: the model cannot be pipeline, or its family is not supported.
    """
    local = find(model.path)
    try:
        if local is not None and local.is_file():
            name, pipeline = _from_file(model, local)
        else:
            name, pipeline = _from_folder_or_hub(model)
    except ConfigError:
        raise
    except Exception as error:  # the loaders raise whatever their files provoke
        wanted = "a Stable Diffusion pipeline" + (
            f" (revision {model.revision!r}, variant {model.variant!r})"
            if model.revision or model.variant
            else ""
        )
        raise pretrained.refusal("model.path", model.path, wanted, error) from error
    _check_channels(model, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, family(name)


def _from_folder_or_hub(model: Model) -> tuple[str, Any]:
    source, kwargs = pretrained.source(model.path, model.revision)
    name = DiffusionPipeline.load_config(source, **kwargs).get("_class_name")
    # The class may be a list that names code beside the weights, and a list cannot be hashed.
    if name not in [*FAMILIES]:
        raise _unsupported(model, name)
    return name, getattr(diffusers, name).from_pretrained(
        source,
        dtype=getattr(torch, model.dtype),
        variant=model.variant,
        use_safetensors=True,
        **_without_safety_checker(name),
        **kwargs,
    )


def _from_file(model: Model, path: Path) -> tuple[str, Any]:
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    name = next((n for n in FAMILIES if family(n).MARK in keys), None)
    if name is None:
        raise _unsupported(model, None)
    config: dict[str, Any] = {}
    if model.config is not None:
        source, kwargs = pretrained.source(model.config)
        config = {"config": source, **kwargs}
    pipeline = getattr(diffusers, name).from_single_file(
        str(path), dtype=getattr(torch, model.dtype), **config, **_without_safety_checker(name)
    )
    return name, pipeline


def _without_safety_checker(name: str) -> dict[str, Any]:
    """Arguments that leave out the safety checker, which would blacken pictures before scoring."""
    if name != "StableDiffusionPipeline":
        return {}
    return {"safety_checker": None, "requires_safety_checker": False}


def _unsupported(model: Model, name: object) -> ConfigError:
    return ConfigError(
        f"model.path {model.path!r} is {f'a {name}' if name else 'of no known family'}: "
        f"{' and '.join(FAMILIES)} are supported"
    )


def _check_channels(model: Model, pipeline: Any) -> None:
    """Refuse inpainting and depth models, which load as the same classes as text-to-image ones."""
    unet_channels = pipeline.unet.config.in_channels
    vae_channels = pipeline.vae.config.latent_channels
    if unet_channels != vae_channels:
        raise ConfigError(
            f"model.path {model.path!r}: its UNet takes {unet_channels} channels, its VAE makes "
            f"{vae_channels}: inpainting and depth models are not text-to-image models"
        )
