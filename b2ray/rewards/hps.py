"""Human Preference Score v2.1 (arXiv 2306.09341): a CLIP with weights in open_clip's format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from transformers import CLIPConfig, CLIPModel

from b2ray.config import Section
from b2ray.diffusion import pretrained
from b2ray.rewards.checkpoint import read
from b2ray.rewards.clip import Clip
from b2ray.rewards.options import HpsOptions

SAFETENSORS = "model.safetensors"
# open_clip's names → CLIPModel's: of single tensors, of modules with a weight and a bias, and of
# such modules within a transformer block.
TENSORS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
MODULES = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = {"text_projection", "visual.proj"}
WRAPPERS = ("model.", "module.")


class Hps(Clip):
    """HPS v2.1, whose scores are cosines of about 0.2 to 0.35."""

    wanted = "open_clip weights"
    usual = "xswu/HPSv2"

    def _model(self, path: str, revision: str | None, options: Section) -> CLIPModel:
        assert isinstance(options, HpsOptions)
        file = pretrained.file(path, SAFETENSORS, revision) or pretrained.file(
            path, options.file, revision
        )
        if file is None:
            raise ValueError(f"it has neither {SAFETENSORS} nor {options.file} (options.file)")
        source, kwargs = pretrained.source(options.processor)
        return build(CLIPConfig.from_pretrained(source, **kwargs), to_clip_model(read(file)))


def to_clip_model(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert open_clip's tensors to the names and the layout of `CLIPModel`, in float32.

    Prefixes that a training program put before every name are removed.

    Args:
        tensors: the tensors by open_clip's names.

    Raises:
        ValueError: open_clip's CLIP has no tensor of this name.
    """
    for wrapper in WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return {
        new: part.float().contiguous()
        for name, tensor in tensors.items()
        for new, part in _converted(name, tensor)
    }


def _converted(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `CLIPModel`, with their names, that one tensor of open_clip becomes."""
    block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
    module, _, kind = name.rpartition(".")
    if name in TENSORS:
        yield TENSORS[name], tensor.T if name in TRANSPOSED else tensor
    elif module in MODULES and kind in ("weight", "bias"):
        yield f"{MODULES[module]}.{kind}", tensor
    elif block:
        yield from _in_block(name, block, tensor)
    else:
        raise ValueError(f"its key {name!r} is unknown")


def _in_block(
    name: str, block: re.Match[str], tensor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same for a tensor of a transformer block, whose query, key and value are separated."""
    layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
    module, _, kind = block[3].rpartition(".")
    if block[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = block[3].rpartition("_")[2]
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{layer}.self_attn.{letter}_proj.{kind}", part
    elif module in IN_BLOCK and kind in ("weight", "bias"):
        yield f"{layer}.{IN_BLOCK[module]}.{kind}", tensor
    else:
        raise ValueError(f"its key {name!r} is unknown")


def build(config: CLIPConfig, tensors: Mapping[str, torch.Tensor]) -> CLIPModel:
    """Make a `CLIPModel` of exactly these tensors.

    Args:
        config: the model's configuration.
        tensors: its tensors by the names of `CLIPModel`.

    Raises:
        ValueError: a tensor, which the message names, is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in CLIPModel(config).state_dict().items()}
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "is missing" if name in expected else "has no place in options.processor's model"
        raise ValueError(f"its {name} {problem}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"its {name} has shape {tuple(tensors[name].shape)}, options.processor's model "
                f"{tuple(shape)}"
            )
    return CLIPModel.from_pretrained(None, config=config, state_dict=dict(tensors))
