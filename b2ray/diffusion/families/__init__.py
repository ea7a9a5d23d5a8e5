"""Model families: what differs between Stable Diffusion 1.x and 2.x, and XL.

A family is a module with the four names of `Family`. To add a family, write its module and enter
the class of its pipelines in `FAMILIES`; docs/howto/models.md describes the rest.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# The pipeline's class, as its model_index.json names it -> the module of its family.
FAMILIES = {
    "StableDiffusionPipeline": "b2ray.diffusion.families.stable_diffusion",
    "StableDiffusionXLPipeline": "b2ray.diffusion.families.stable_diffusion_xl",
}


@dataclass(frozen=True)
class Condition:
    """The UNet's inputs that depend on the prompt, for one prompt.

    Attributes:
        text: hidden states of the prompt for the UNet's cross-attention, shape (L, D).
        added: tensors for the UNet's `added_cond_kwargs` by name, without the batch dimension.
    """

    text: torch.Tensor
    added: dict[str, torch.Tensor]


class Family(Protocol):
    """The interface of a family's module."""

    TOKENIZERS: tuple[str, ...]
    """Names of the pipeline's attributes that hold its tokenizers."""
    ENCODERS: tuple[str, ...]
    """Names of the pipeline's attributes that hold its text encoders."""
    MARK: str
    """Name of a tensor that single-file checkpoints of this family have and all others lack."""

    def encode(self, pipeline: Any, prompt: str | None, height: int, width: int) -> Condition:
        """Encode a prompt on the device of the text encoder.

        Args:
            pipeline: a diffusers pipeline of this family.
            prompt: the prompt, or None for the unconditional half of guidance.
            height: height of the picture in pixels.
            width: width of the picture in pixels.
        """
        ...


def family(pipeline_class: str) -> Family:
    """The family of a pipeline class, given by its name.

    Raises:
        KeyError: no family has this class.
    """
    return importlib.import_module(FAMILIES[pipeline_class])
