"""The head of the aesthetic predictor and of ImageReward: five linear layers, no activations."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from b2ray.rewards.checkpoint import Tensors, shape

LAYERS = (0, 2, 4, 6, 7)
"""Indices of the linear layers in the head, between the dropouts, as the keys contain them."""


def make(widths: tuple[int, ...]) -> nn.Sequential:
    """A head with random weights and the dropouts of the released heads.

    Args:
        widths: six widths, from the input of the first layer to the output of the fifth.
    """
    dropouts: list[nn.Module] = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    modules: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        modules += [nn.Linear(inputs, outputs), *dropouts[i : i + 1]]
    return nn.Sequential(*modules)


def widths(tensors: Tensors, prefix: str) -> tuple[int, ...]:
    """The six widths of a head, read from the shapes of its tensors `<prefix>N.weight`."""
    shapes = [shape(tensors, f"{prefix}{i}.weight") for i in LAYERS]
    return (shapes[0][1], *(s[0] for s in shapes))


def fold(head: nn.Sequential) -> nn.Linear:
    """The affine map that a head computes without its dropouts, as one layer in float64."""
    layers = [m for m in head if isinstance(m, nn.Linear)]
    weight, bias = layers[0].weight.double(), layers[0].bias.double()
    for layer in layers[1:]:
        weight = layer.weight.double() @ weight
        bias = layer.weight.double() @ bias + layer.bias.double()
    folded = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    folded.load_state_dict({"weight": weight, "bias": bias})
    return folded
