"""A diffusers pipeline and its family, from a folder, the hub, or one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from b2ray import hub
from b2ray.config import Model
from b2ray.diffusion.families import FAMILIES, Family, family
from b2ray.errors import ConfigError
from b2ray.options import find


def load_pipeline(model: Model) -> tuple[Any, Family]:
    """The pipeline in `model.dtype` on the CPU, without a safety checker, and its family.

    Raises:
        ConfigError: one sentence about a model that does not load or is of no known family.
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
        raise hub.refusal("model.path", model.path, wanted, error) from error
    _refuse_misfit(model, pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, family(name)


def _from_folder_or_hub(model: Model) -> tuple[str, Any]:
    source, where = hub.source(model.path, model.revision)
    name = DiffusionPipeline.load_config(source, **where).get("_class_name")
    if name not in [*FAMILIES]:  # a list would name code beside the weights
        raise _unknown(model, name)
    return name, getattr(diffusers, name).from_pretrained(
        source,
        dtype=getattr(torch, model.dtype),
        variant=model.variant,
        use_safetensors=True,
        **_unchecked(name),
        **where,
    )


def _from_file(model: Model, path: Path) -> tuple[str, Any]:
    with safe_open(path, framework="pt") as file:
        there = set(file.keys())
    name = next((n for n in FAMILIES if family(n).MARK in there), None)
    if name is None:
        raise _unknown(model, None)
    described: dict[str, Any] = {}
    if model.config is not None:
        source, where = hub.source(model.config)
        described = {"config": source, **where}
    loaded = getattr(diffusers, name).from_single_file(
        str(path), dtype=getattr(torch, model.dtype), **described, **_unchecked(name)
    )
    return name, loaded


def _unchecked(name: str) -> dict[str, Any]:
    """No safety checker: it would blacken pictures behind the reward's back."""
    if name != "StableDiffusionPipeline":
        return {}
    return {"safety_checker": None, "requires_safety_checker": False}


def _unknown(model: Model, name: object) -> ConfigError:
    return ConfigError(
        f"model.path {model.path!r} is {f'a {name}' if name else 'of no known family'}: "
        f"{' and '.join(FAMILIES)} are supported"
    )


def _refuse_misfit(model: Model, pipeline: Any) -> None:
    """Inpainting models and the like load as these classes, and need more than a prompt."""
    wants, gets = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if wants != gets:
        raise ConfigError(
            f"model.path {model.path!r}: its UNet takes {wants} channels, its VAE makes {gets}: "
            "inpainting and depth models are not text-to-image models"
        )
