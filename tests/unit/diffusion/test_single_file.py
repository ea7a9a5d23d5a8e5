"""A single .safetensors checkpoint, with the names that Stable Diffusion was published with."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from b2ray.diffusion.lora_export import sdxl_name
from b2ray.diffusion.noise import INITIAL, Domain, normal
from b2ray.diffusion.policy import Policy
from b2ray.errors import ConfigError
from tests.models import PROMPTS, config, pipeline

CPU = torch.device("cpu")
RESNET = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    new = sdxl_name(module) if "block" in module or module in ("conv_in", "conv_out") else module
    for old, published in () if "transformer" in module else RESNET.items():
        new = re.sub(rf"(?<=\.\d)\.{old}$", f".{published}", new)
    outside = {"conv_norm_out": "out.0", "time_embedding.linear_1": "time_embed.0"}
    outside["time_embedding.linear_2"] = "time_embed.2"
    return f"model.diffusion_model.{outside.get(new, new)}.{kind}"


def vae_name(name: str, blocks: int = 2) -> str:
    new = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
    new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
    new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", new)
    new = re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new
    )
    new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
    if "mid_block.attentions.0" in new:
        new = new.replace("mid_block.attentions.0", "mid.attn_1")
        for old, published in ATTENTION.items():
            new = new.replace(f".{old}.", f".{published}.")
    return f"first_stage_model.{new}"


def published(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """All tensors under the names of the original checkpoints."""
    tensors = {unet_name(k): v for k, v in pipe.unet.state_dict().items()}
    for k, v in pipe.vae.state_dict().items():
        name = vae_name(k)
        square = ".attn_1." in name and name.endswith("weight") and ".norm." not in name
        tensors[name] = v[:, :, None, None] if square else v  # 1 × 1 convolutions there
    text = pipe.text_encoder.state_dict()
    prefix = "cond_stage_model.transformer.text_model."
    return tensors | {prefix + k.removeprefix("text_model."): v for k, v in text.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """`base`, a pipeline's folder, and `base.safetensors`, the same weights as one file."""
    root = tmp_path_factory.mktemp("single")
    pipe = pipeline()
    torch.manual_seed(1)
    sizes = {"block_out_channels": (8, 16), "cross_attention_dim": 16, "norm_num_groups": 4}
    pipe.register_modules(
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            attention_head_dim=2,
            **sizes,
        )
    )
    pipe.save_pretrained(root / "base")
    tensors = {k: v.contiguous().clone() for k, v in published(pipe).items()}
    save_file(tensors, root / "base.safetensors")
    return root


def test_one_file_is_the_folder_it_was_made_of(models, files):
    folder = Policy(config(models, model__path=files / "base"), CPU)
    single = Policy(
        config(models, model__path=files / "base.safetensors", model__config=files / "base"), CPU
    )
    x = torch.from_numpy(normal(0, Domain.TRAIN, 0, [(0, 0)], INITIAL, folder.latent_shape))

    def picture(policy: Policy) -> np.ndarray:
        noise = np.random.default_rng(0)
        latents = policy.denoise(
            x,
            PROMPTS[:1],
            0,
            4,
            lambda _: noise.standard_normal((1, 4, 8, 8), np.float32),
        ).latents[:, -1]
        return policy.decode(latents)

    assert np.ptp(picture(folder)) > 0
    np.testing.assert_array_equal(picture(single), picture(folder))
    # Another file, another picture: the weights are the file's, not the folder's.
    with torch.no_grad():
        single.pipeline.unet.conv_in.weight.add_(1)
    assert (picture(single) != picture(folder)).any()


def test_a_file_of_no_family_is_named(models, tmp_path):
    save_file({"some.other.model": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"is of no known family: StableDiffusionPipeline and"):
        Policy(config(models, model__path=tmp_path / "other.safetensors"), CPU)


def test_a_broken_file_is_named(models, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match=r"broken\.safetensors' cannot be loaded as"):
        Policy(config(models, model__path=tmp_path / "broken.safetensors"), CPU)
