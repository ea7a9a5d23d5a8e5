"""Weights files of which every key is accounted for. All errors name the file's own keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

Tensors = Mapping[str, torch.Tensor]


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a pickle of tensors alone, on the CPU.

    Those of a pickled training checkpoint are under `state_dict`.

    Raises:
        ValueError: the pickle holds something else.
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
    """The shape of a tensor that has to be there."""
    if key not in tensors:
        raise ValueError(f"the key {key} is missing")
    return tuple(tensors[key].shape)


def fill(
    module: nn.Module,
    tensors: Tensors,
    name: Callable[[str], str] = str,
    unused: Collection[str] = (),
) -> None:
    """Load a module's every parameter, in its own dtype.

    Args:
        name: the module's key → the file's.
        unused: keys of the file that are known and not needed.

    Raises:
        ValueError: a key is missing or unknown, or a tensor has another shape.
    """
    own = module.state_dict()
    theirs = {name(key): key for key in own}
    missing = [key for key in theirs if key not in tensors]
    unknown = [key for key in tensors if key not in theirs and key not in unused]
    for what, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"keys are {what}: {', '.join(keys[:3])}{more}")
    for key, ours in theirs.items():
        if tensors[key].shape != own[ours].shape:
            raise ValueError(
                f"{key} has shape {tuple(tensors[key].shape)} where {tuple(own[ours].shape)} fits"
            )
    module.load_state_dict({ours: tensors[key] for key, ours in theirs.items()})
