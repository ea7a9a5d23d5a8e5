"""A LoRA as arrays and as a file in diffusers' format; needs neither torch nor a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from b2ray.config import Lora
from b2ray.diffusion.tensors import packed

State = Mapping[str, np.ndarray]  # parameter name -> float32 array
FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for


def digest(values: State) -> str:
    """The blake2b hash of names, types, shapes and bytes, in the order of the names."""
    hash_ = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        hash_.update(f"{name}{value.dtype}{value.shape}".encode())
        hash_.update(value.data)
    return hash_.hexdigest()


def save(folder: Path, values: State, config: Lora) -> Path:
    """Write an adapter as a file that diffusers' `load_lora_weights` reads.

    The same values give the same bytes.

    Args:
        folder: where the file is written; it is made if need be.
        values: the adapter's values by diffusers' names.
        config: the adapter's rank, alpha and targets.

    Returns:
        The path of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"unet.{name}": value for name, value in values.items()}
    file = folder / FILE
    file.write_bytes(packed(tensors, metadata(config)))
    return file


def metadata(config: Lora) -> dict[str, str]:
    """The file's metadata about rank and alpha; without it diffusers assumes alpha = rank."""
    adapter = {
        "unet.r": config.rank,
        "unet.lora_alpha": config.alpha,
        "unet.target_modules": sorted(config.targets),
        "unet.peft_type": "LORA",
    }
    return {"lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}


def load(file: Path) -> dict[str, np.ndarray]:
    """Read the values of a file that `save` wrote."""
    return {
        name.removeprefix("unet."): value
        for name, value in safetensors.numpy.load_file(file).items()
    }
