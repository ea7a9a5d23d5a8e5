"""Adding a LoRA to a UNet, and reading and replacing its values.

The values are float32. Loading is strict, and the digest of the bound values proves it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer

from b2ray.config import Lora
from b2ray.diffusion.lora_file import State, digest
from b2ray.errors import ConfigError


def add(unet: Any, config: Lora, seed: int) -> None:
    """Freeze a UNet and add a float32 adapter to it, whose output is zero before training.

    Args:
        unet: diffusers' UNet; it is changed in place.
        config: rank, alpha and target modules.
        seed: seed of the random initial values.

    Raises:
        ConfigError: a target matches no module.
    """
    names = [name for name, _ in unet.named_modules()]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"model.lora.targets names {target!r}, but the UNet has no such module: "
                "to_q, to_k, to_v and to_out.0 are its attention"
            )
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                init_lora_weights="gaussian",
                target_modules=list(config.targets),
            )
        )
    for parameter in parameters(unet).values():
        parameter.data = parameter.data.float()
    if config.merged:
        for module in unet.modules():
            if isinstance(module, Linear):
                module.forward = MethodType(_merged_forward, module)


def layers(unet: torch.nn.Module) -> list[BaseTunerLayer]:
    """The modules that have an adapter.

    Calling `enable_adapters` of each is faster than that of the UNet, which searches for these
    modules and checks peft's version at every call.
    """
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


def parameters(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by diffusers' names, sorted by name."""
    adapter = {
        name.replace(".default.", "."): parameter
        for name, parameter in unet.named_parameters()
        if ".lora_" in name
    }
    return dict(sorted(adapter.items()))


def state(unet: torch.nn.Module) -> dict[str, np.ndarray]:
    """A copy of the adapter's values as float32 arrays by diffusers' names."""
    return {
        name: parameter.detach().float().cpu().numpy().copy()
        for name, parameter in parameters(unet).items()
    }


def bind(unet: torch.nn.Module, new: State) -> str:
    """Replace the values of a model's adapter.

    Args:
        unet: a UNet with an adapter (`add`).
        new: the values by diffusers' names.

    Returns:
        The digest of the values that the model has now.

    Raises:
        ConfigError: names or shapes differ from those of the model's adapter, or `new` is empty.
    """
    adapter = parameters(unet)
    missing, extra = sorted(adapter.keys() - new.keys()), sorted(new.keys() - adapter.keys())
    if not new or missing or extra:
        raise ConfigError(
            f"the LoRA does not fit the model: {len(missing)} of {len(adapter)} keys missing, "
            f"{len(extra)} unknown (first: {next(iter([*missing, *extra]), 'it is empty')})"
        )
    for name, parameter in adapter.items():
        if parameter.shape != new[name].shape:
            raise ConfigError(
                f"the LoRA's {name} has shape {new[name].shape}, the model's "
                f"{tuple(parameter.shape)}: rank and base model must be the same"
            )
    with torch.no_grad():
        for name, parameter in adapter.items():
            parameter.copy_(torch.from_numpy(np.array(new[name], np.float32)))
    return digest(state(unet))


def _merged_forward(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """(W + scale·B·A)·x + b: adds the adapter to the base weight before applying it to the input.

    Sampler and learner both compute this at every call, so that their densities agree, and
    gradients reach B and A through the sum.
    """
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    if not layer.disable_adapters:
        (name,) = layer.active_adapters
        update = layer.lora_B[name].weight @ layer.lora_A[name].weight
        weight = weight + layer.scaling[name] * update
    return torch.nn.functional.linear(x, weight, bias)
