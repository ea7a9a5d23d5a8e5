"""Model families: what differs between Stable Diffusion 1.x and 2.x, and XL.

A family is a module with the four names of `Family`. To add one, write its module and enter the
class of its pipelines here; docs/models.md says what else there is to know.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

# The class that a pipeline's model_index.json names -> the module of its family.
FAMILIES = {
    "StableDiffusionPipeline": "b2ray.diffusion.families.stable_diffusion",
    "StableDiffusionXLPipeline": "b2ray.diffusion.families.stable_diffusion_xl",
}


@dataclass(frozen=True)
class Condition:
    """What the UNet is told of one prompt.

    Attributes:
        text: hidden states for its cross-attention, shape (L, D).
        added: rows of its `added_cond_kwargs` by name, each without the batch dimension.
    """

    text: torch.Tensor
    added: dict[str, torch.Tensor]


class Family(Protocol):
    """The interface of a family's module."""

    TOKENIZERS: tuple[str, ...]
    """Attributes of the pipeline: its tokenizers."""
    ENCODERS: tuple[str, ...]
    """Attributes of the pipeline: its text encoders."""
    MARK: str
    """A tensor that checkpoints of this family have in a single file, and others have not."""

    def encode(self, pipeline: Any, prompt: str | None, height: int, width: int) -> Condition:
        """The condition of a prompt, or of none (the unconditional half of guidance), on the text
        encoder's device, for pictures of height × width pixels."""
        ...


def family(pipeline_class: str) -> Family:
    """The family of a pipeline class. Raises KeyError for a class that no family has."""
    return importlib.import_module(FAMILIES[pipeline_class])
