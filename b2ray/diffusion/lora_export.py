"""A trained LoRA in the file formats of other programs, as pure functions of its arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import safetensors.torch
import torch

from b2ray.config import Lora
from b2ray.diffusion.lora_file import State, metadata
from b2ray.diffusion.tensors import reproducible
from b2ray.errors import ConfigError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
SD2_TEXT_WIDTH = 1024  # width of the text encoder's output; in Stable Diffusion 1.x it is 768

# SDXL was published with other module names than those of diffusers. Its blocks are numbered
# consecutively, three per level, and within a block the modules are numbered, too. These tables
# map diffusers' names to SDXL's: outside of blocks, of modules in a block, and inside of modules.
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_PLACE = {"resnets": "0", "attentions": "1", "downsamplers": "0", "upsamplers": "2"}
_INSIDE = {
    ("resnets", "conv1"): "in_layers.2",
    ("resnets", "conv2"): "out_layers.3",
    ("resnets", "time_emb_proj"): "emb_layers.1",
    ("resnets", "conv_shortcut"): "skip_connection",
    ("downsamplers", "conv"): "op",
}


def diffusers(weights: State, config: Lora, dtype: torch.dtype) -> bytes:
    """The file that diffusers' `load_lora_weights` reads.

    In float32 its bytes are those of the file that the run itself writes.

    Args:
        weights: the adapter's values by diffusers' names.
        config: the adapter's rank, alpha and targets.
        dtype: type of the tensors in the file.

    Raises:
        ConfigError: a value is too large for `dtype`.
    """
    tensors = {f"unet.{name}": _cast(name, _tensor(v), dtype) for name, v in weights.items()}
    return _packed(tensors, metadata(config))


def kohya(weights: State, config: Lora, dtype: torch.dtype, title: str) -> bytes:
    """The file that ComfyUI and AUTOMATIC1111 read, as kohya-ss/sd-scripts names its tensors.

    A module has `lora_down`, `lora_up` and `alpha`; readers scale the update by alpha / rank.
    Modules have diffusers' names for Stable Diffusion 1.x and 2.x, and SDXL's own names for SDXL.

    Args:
        weights: the adapter's values by diffusers' names.
        config: the adapter's rank, alpha and targets.
        dtype: type of the tensors in the file.
        title: the name that user interfaces show.

    Raises:
        ConfigError: a value is too large for `dtype`.
    """
    version = family(weights)
    tensors = {}
    for module, down, up in updates(weights):
        name = sdxl_name(module) if version.startswith("sdxl") else module
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = _cast(module, down, dtype)
        tensors[f"{key}.lora_up.weight"] = _cast(module, up, dtype)
        tensors[f"{key}.alpha"] = torch.tensor(config.alpha)
    notes = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(config.alpha),
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_output_name": title,
    }
    return _packed(tensors, notes)


def merge(unet: torch.nn.Module, weights: State, config: Lora, dtype: torch.dtype) -> None:
    """Merge a LoRA into a UNet, whose weights become W + alpha / rank · B·A.

    The formula is from section 4.1 of arXiv 2106.09685.

    Args:
        unet: diffusers' UNet in float32; it is changed in place.
        weights: the adapter's values by diffusers' names.
        config: the adapter's rank and alpha.
        dtype: type to which all weights of the UNet are cast afterwards.

    Raises:
        ConfigError: the LoRA was made for another model, or a value is too large for `dtype`.
    """
    modules = dict(unet.named_modules())
    for name, down, up in updates(weights):
        update = config.alpha / config.rank * (up.flatten(1) @ down.flatten(1))
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or (len(weight), weight[0].numel()) != update.shape:
            raise ConfigError(
                f"the LoRA does not fit the model: {name} is missing there or has another shape; "
                "model.path must be the model that the run was started with"
            )
        weight.data += update.view_as(weight)
    for name, parameter in unet.named_parameters():
        parameter.data = _cast(name, parameter.data, dtype)


def family(weights: State) -> str:
    """The base model's version as sd-scripts names it, from the LoRA's names and shapes.

    Only SDXL has attention modules with more than one transformer block. Stable Diffusion 2.x
    differs from 1.x in the width of the text that cross-attention reads.
    """
    if any(".transformer_blocks.1." in name for name in weights):
        return "sdxl_base_v1-0"
    ends = (f"2.to_k{DOWN}", f"2.to_v{DOWN}")
    text_widths = [v.shape[1] for name, v in weights.items() if name.endswith(ends)]
    return "sd_v2" if SD2_TEXT_WIDTH in text_widths else "sd_v1"


def sdxl_name(module: str) -> str:
    """The name that sd-scripts' LoRA files give to a module of diffusers' UNet of SDXL."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    side, *parts = module.split(".")
    level = 0 if side == "mid_block" else int(parts.pop(0))
    kind, index, *inner = parts
    # The downsampler or upsampler of a level is in or beside its third block.
    block = 3 * level + (2 if kind.endswith("samplers") else int(index))
    place = {
        "down_blocks": f"input_blocks.{block + 1}.{_PLACE[kind]}",
        "mid_block": f"middle_block.{1 if kind == 'attentions' else 2 * block}",
        "up_blocks": f"output_blocks.{block}.{_PLACE[kind]}",
    }[side]
    return ".".join([place, _INSIDE.get((kind, inner[0]), inner[0]), *inner[1:]])


def updates(weights: State) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, A and B of each module with an adapter, in the order of the names."""
    for name in sorted(weights):
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            yield module, _tensor(weights[name]), _tensor(weights[module + UP])


def _tensor(value: object) -> torch.Tensor:
    return torch.from_numpy(value)


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = value.to(dtype)
    if not cast.isfinite().all():
        raise ConfigError(
            f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold: "
            "use --dtype bfloat16 or float32"
        )
    return cast


def _packed(tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> bytes:
    """As `b2ray.diffusion.tensors.packed`, but also for types that numpy lacks (bfloat16)."""
    return reproducible(safetensors.torch.save(dict(sorted(tensors.items())), metadata=dict(notes)))
