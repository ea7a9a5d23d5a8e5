"""Strict reading of weights files, with errors that name the keys of the file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

Tensors = Mapping[str, torch.Tensor]


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors file, or of a pickle that contains only tensors.

    In a pickled training checkpoint these are the tensors under `state_dict`.

    Returns:
        The tensors on the CPU by their keys.

    Raises:
        ValueError: the pickle contains something else.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(tensors, dict):
        tensors = tensors.get("state_dict", tensors)
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{path.name} is not a mapping of names to tensors")
    return tensors


def shape(tensors: Tensors, key: str) -> tuple[int, ...]:
    """The shape of a tensor.

    Raises:
        ValueError: there is no such tensor.
    """
    if key not in tensors:
        raise ValueError(f"the key {key} is missing")
    return tuple(tensors[key].shape)


def fill(
    module: nn.Module,
    tensors: Tensors,
    name: Callable[[str], str] = str,
    unused: Collection[str] = (),
) -> None:
    """Load all parameters and buffers of a module, which keeps their types.

    Args:
        module: the module.
        tensors: the tensors of a file.
        name: maps a key of the module to that of the file.
        unused: keys of the file that the module does not need.

    Raises:
        ValueError: a key is missing or unknown, or a tensor has another shape.
    """
    state = module.state_dict()
    module_keys = {name(key): key for key in state}  # by the file's keys
    missing = [key for key in module_keys if key not in tensors]
    unknown = [key for key in tensors if key not in module_keys and key not in unused]
    for problem, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"keys are {problem}: {', '.join(keys[:3])}{more}")
    for key, module_key in module_keys.items():
        shape, expected = tensors[key].shape, state[module_key].shape
        if shape != expected:
            raise ValueError(f"{key} has shape {tuple(shape)} where {tuple(expected)} fits")
    module.load_state_dict({own: tensors[key] for key, own in module_keys.items()})
