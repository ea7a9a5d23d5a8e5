"""LoRA as arrays and as a file: its digest, diffusers' format. Needs neither torch nor a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from b2ray.config import Lora

State = Mapping[str, np.ndarray]  # parameter name -> float32 array
FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for


def digest(values: State) -> str:
    """blake2b of names, shapes and bytes, in the order of the names."""
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        value = np.ascontiguousarray(values[name])
        h.update(f"{name}{value.dtype}{value.shape}".encode())
        h.update(value.data)
    return h.hexdigest()


def save(folder: Path, values: State, config: Lora) -> Path:
    """Write the adapter as diffusers' `load_lora_weights` reads it; returns the file.

    The same values give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"unet.{name}": value for name, value in sorted(values.items())}
    file = folder / FILE
    file.write_bytes(safetensors.numpy.save(tensors, metadata=metadata(config)))
    return file


def metadata(config: Lora) -> dict[str, str]:
    """What diffusers reads besides the tensors: without it, it assumes alpha = rank."""
    adapter = {
        "unet.r": config.rank,
        "unet.lora_alpha": config.alpha,
        "unet.target_modules": sorted(config.targets),
        "unet.peft_type": "LORA",
    }
    # One entry only: safetensors writes several in random order.
    return {"lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}


def load(file: Path) -> dict[str, np.ndarray]:
    """Read what `save` wrote."""
    return {
        name.removeprefix("unet."): value
        for name, value in safetensors.numpy.load_file(file).items()
    }
