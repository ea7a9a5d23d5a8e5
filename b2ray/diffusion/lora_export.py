"""A trained LoRA in the forms that other programs read: pure functions of its arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import safetensors.torch
import torch

from b2ray.config import Lora
from b2ray.diffusion.lora_file import State, metadata
from b2ray.errors import ConfigError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
SD2_TEXT_WIDTH = 1024  # of the text encoder's output; Stable Diffusion 1.x has 768

# SDXL was published with other module names than diffusers'. Its blocks are numbered through,
# three to a level; within a block the modules are numbered, too.
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
    """The file that diffusers' `load_lora_weights` reads; in float32 the run's own, byte by byte.

    Raises:
        ConfigError: a value is too large for `dtype`.
    """
    tensors = {f"unet.{name}": _cast(name, _tensor(v), dtype) for name, v in weights.items()}
    return _file(tensors, metadata(config))


def kohya(weights: State, config: Lora, dtype: torch.dtype, title: str) -> bytes:
    """The file that ComfyUI and AUTOMATIC1111 read, as kohya-ss/sd-scripts names its tensors.

    A module has `lora_down`, `lora_up` and `alpha`; readers scale the update by alpha / rank.
    Modules have diffusers' names for Stable Diffusion 1.x and 2.x and SDXL's own for SDXL.

    Args:
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
    return _file(tensors, notes)


def merge(unet: torch.nn.Module, weights: State, config: Lora, dtype: torch.dtype) -> None:
    """Add the LoRA to a float32 UNet's own weights and cast them all: W + alpha / rank · B·A.

    The formula is section 4.1 of arXiv 2106.09685.

    Raises:
        ConfigError: the LoRA is of another model, or a value is too large for `dtype`.
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
    """The base model's family in sd-scripts' words, from the LoRA's names and shapes alone.

    Only SDXL has attention of more than one transformer block; the width of the text that
    attention reads tells 2.x from 1.x.
    """
    if any(".transformer_blocks.1." in name for name in weights):
        return "sdxl_base_v1-0"
    text = [v for name, v in weights.items() if name.endswith((f"2.to_k{DOWN}", f"2.to_v{DOWN}"))]
    return "sd_v2" if any(v.shape[1] == SD2_TEXT_WIDTH for v in text) else "sd_v1"


def sdxl_name(module: str) -> str:
    """SDXL's own name of a module of diffusers' UNet, as in sd-scripts' LoRA files."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    side, *words = module.split(".")
    level = 0 if side == "mid_block" else int(words.pop(0))
    kind, index, *inner = words
    # The sampler of a level is in or beside its third block.
    at = 3 * level + (2 if kind.endswith("samplers") else int(index))
    place = {
        "down_blocks": f"input_blocks.{at + 1}.{_PLACE[kind]}",
        "mid_block": f"middle_block.{1 if kind == 'attentions' else 2 * at}",
        "up_blocks": f"output_blocks.{at}.{_PLACE[kind]}",
    }[side]
    return ".".join([place, _INSIDE.get((kind, inner[0]), inner[0]), *inner[1:]])


def updates(weights: State) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module, A, B) of each adapted module, sorted by name, float32."""
    for name in sorted(weights):
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            yield module, _tensor(weights[name]), _tensor(weights[module + UP])


def _tensor(value: object) -> torch.Tensor:
    return torch.from_numpy(value)


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    smaller = value.to(dtype)
    if not smaller.isfinite().all():
        raise ConfigError(
            f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold: "
            "use --dtype bfloat16 or float32"
        )
    return smaller


def _file(tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> bytes:
    """A safetensors file; the same values give the same bytes."""
    blob = safetensors.torch.save(dict(sorted(tensors.items())), metadata=dict(notes))
    # safetensors writes metadata in random order: sort the header, whose length stays.
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return blob[:8] + text.ljust(end - 8) + blob[end:]
