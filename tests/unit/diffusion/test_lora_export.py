"""A LoRA in other programs' forms: loaded there, it draws the pictures that training drew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from b2ray.config import Lora
from b2ray.diffusion import lora, lora_export, lora_file
from b2ray.diffusion.lora_export import diffusers, family, kohya, merge, sdxl_name
from b2ray.diffusion.policy import Policy
from b2ray.errors import ConfigError
from tests.models import PROMPTS, config, pipeline, random_lora, sdxl

FULL = torch.float32
SETTINGS = Lora(rank=2, alpha=3.0)  # alpha ≠ rank: a lost scale is seen
CONVOLUTIONS = Lora(rank=2, alpha=3.0, targets=("to_q", "to_out.0", "conv1", "conv_shortcut"))
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
STEPS, GUIDANCE = 4, 3.0


def pictures(pipe: DiffusionPipeline) -> np.ndarray:
    """Two pictures, float32 in [0, 1], without noise in the steps."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS[:2],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        eta=0.0,
        latents=X,
        output_type="np",
    ).images


def bound(make: Callable, settings: Lora) -> tuple[DiffusionPipeline, dict[str, np.ndarray]]:
    """A pipeline with a LoRA bound as in training, and the LoRA."""
    pipe = make()
    lora.add(pipe.unet, settings, 0)
    weights = random_lora(lora.state(pipe.unet))
    lora.bind(pipe.unet, weights)
    return pipe, weights


@pytest.fixture(scope="module", params=[pipeline, sdxl], ids=["sd", "sdxl"])
def family_of(request):
    """(pipeline without, weights, pictures with, pictures without) of a small model."""
    pipe, weights = bound(request.param, SETTINGS)
    plain = pictures(request.param())
    drawn = pictures(pipe)
    assert np.abs(drawn - plain).max() > 0.05  # else nothing below is tested
    return request.param, weights, drawn


def difference(pipe: DiffusionPipeline, drawn: np.ndarray) -> float:
    return float(np.abs(pictures(pipe) - drawn).max())


def load(pipe: DiffusionPipeline, folder: Path, content: bytes) -> DiffusionPipeline:
    (folder / "x.safetensors").write_bytes(content)
    pipe.load_lora_weights(folder, weight_name="x.safetensors")
    return pipe


def read(content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    length = int.from_bytes(content[:8], "little")
    notes = json.loads(content[8 : 8 + length])["__metadata__"]
    return safetensors.torch.load(content), notes


# --- the pictures ----------------------------------------------------------------------------


def test_the_reference_is_what_a_policy_draws(models):
    settings = {"model__lora__rank": 2, "model__lora__alpha": 3.0, "sampling__steps": STEPS}
    policy = Policy(
        config(models, sampling__guidance=GUIDANCE, sampling__eta=1e-9, **settings),
        torch.device("cpu"),
    )
    pipe, weights = bound(pipeline, SETTINGS)
    policy.bind(weights)
    rollout = policy.denoise(X, PROMPTS[:2], 0, STEPS, lambda _: np.zeros(X.shape, np.float32))
    vae = policy.pipeline.vae
    with torch.no_grad():
        decoded = vae.decode(rollout.latents[:, -1] / vae.config.scaling_factor).sample
    ours = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - pictures(pipe)).max() < 1e-4


def test_the_diffusers_file_draws_the_same(family_of, tmp_path):
    make, weights, drawn = family_of
    assert difference(load(make(), tmp_path, diffusers(weights, SETTINGS, FULL)), drawn) < 1e-4


def test_the_kohya_file_draws_the_same_in_diffusers(family_of, tmp_path):
    make, weights, drawn = family_of
    content = kohya(weights, SETTINGS, FULL, "x")
    assert difference(load(make(), tmp_path, content), drawn) < 1e-4


def test_the_merged_weights_draw_the_same(family_of):
    make, weights, drawn = family_of
    pipe = make()
    merge(pipe.unet, weights, SETTINGS, FULL)
    assert difference(pipe, drawn) < 1e-4


def test_the_kohya_file_applied_by_hand_draws_the_same():
    pipe, weights = bound(pipeline, SETTINGS)
    file, _ = read(kohya(weights, SETTINGS, FULL, "x"))
    plain, used = pipeline(), 0
    for name, module in plain.unet.named_modules():
        key = "lora_unet_" + name.replace(".", "_")
        if f"{key}.alpha" in file:
            down, up = file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"]
            module.weight.data += file[f"{key}.alpha"] / down.shape[0] * up @ down
            used += 3
    assert used == len(file)
    assert difference(plain, pictures(pipe)) < 1e-4


@pytest.mark.parametrize("form", ["kohya", "merged"])
def test_adapted_convolutions_are_exported_too(form, tmp_path):
    pipe, weights = bound(pipeline, CONVOLUTIONS)
    assert any(v.ndim == 4 for v in weights.values())
    other = pipeline()
    if form == "kohya":
        load(other, tmp_path, kohya(weights, CONVOLUTIONS, FULL, "x"))
    else:
        merge(other.unet, weights, CONVOLUTIONS, FULL)
    assert difference(other, pictures(pipe)) < 1e-4


# --- names and notes -------------------------------------------------------------------------

PARTS = [
    f"_transformer_blocks_{{}}_attn{n}_to_{p}.{part}"
    for n in (1, 2)
    for p in ("q", "k", "v", "out_0")
    for part in ("lora_down.weight", "lora_up.weight", "alpha")
]


def keys(depths: dict[str, int]) -> set[str]:
    return {
        f"lora_unet_{place}{part.format(block)}"
        for place, depth in depths.items()
        for block in range(depth)
        for part in PARTS
    }


def test_a_stable_diffusion_models_kohya_keys():
    _, weights = bound(pipeline, SETTINGS)
    file, notes = read(kohya(weights, SETTINGS, FULL, "my run"))
    assert file.keys() == keys(
        {
            "down_blocks_1_attentions_0": 1,
            "mid_block_attentions_0": 1,
            "up_blocks_0_attentions_0": 1,
            "up_blocks_0_attentions_1": 1,
        }
    )
    assert all(v == 3.0 and v.shape == () for k, v in file.items() if k.endswith(".alpha"))
    assert notes == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "3.0",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_output_name": "my run",
    }


def test_an_sdxl_models_kohya_keys():
    _, weights = bound(sdxl, SETTINGS)
    file, notes = read(kohya(weights, SETTINGS, FULL, "x"))
    assert file.keys() == keys(
        {
            **{"input_blocks_4_1": 2, "input_blocks_5_1": 2},
            **{"input_blocks_7_1": 3, "input_blocks_8_1": 3},
            "middle_block_1": 3,
            **{"output_blocks_0_1": 3, "output_blocks_1_1": 3, "output_blocks_2_1": 3},
            **{"output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2},
        }
    )
    assert notes["ss_base_model_version"] == "sdxl_base_v1-0"


def test_every_sdxl_name_is_the_one_that_diffusers_reads_in_checkpoints():
    unet = sdxl().unet
    adaptable = {
        name: value
        for name, value in unet.state_dict().items()
        if not (".resnets." in name and ".norm" in name) and "conv_norm_out" not in name
    }
    checkpoint = {}
    for name, value in adaptable.items():
        module, parameter = name.rsplit(".", 1)
        checkpoint[f"model.diffusion_model.{sdxl_name(module)}.{parameter}"] = value
    assert len(checkpoint) == len(adaptable)
    again = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert again.keys() == adaptable.keys()
    assert all(torch.equal(again[name], adaptable[name]) for name in adaptable)


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("attentions.0.transformer_blocks.0.attn2.to_k", 768, "sd_v1"),
        ("attentions.0.transformer_blocks.0.attn2.to_k", 1024, "sd_v2"),
        ("attentions.0.transformer_blocks.0.attn2.to_v", 1024, "sd_v2"),
        ("attentions.0.transformer_blocks.0.attn1.to_k", 1024, "sd_v1"),
        ("attentions.0.transformer_blocks.1.attn2.to_k", 2048, "sdxl_base_v1-0"),
    ],
)
def test_the_family_is_seen_from_the_lora(name, width, expected):
    assert family({f"mid_block.{name}.lora_A.weight": np.zeros((4, width))}) == expected


# --- bytes and precision ---------------------------------------------------------------------


def test_in_float32_the_diffusers_file_is_the_runs_own(tmp_path):
    _, weights = bound(pipeline, SETTINGS)
    file = lora_file.save(tmp_path, weights, SETTINGS)
    assert diffusers(weights, SETTINGS, FULL) == file.read_bytes()


def test_the_same_lora_gives_the_same_bytes():
    _, weights = bound(pipeline, SETTINGS)
    turned = dict(reversed(weights.items()))
    files = {kohya(w, SETTINGS, FULL, "é") for w in (weights, turned) for _ in range(10)}
    assert len(files) == 1
    assert read(files.pop())[1]["ss_output_name"] == "é"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_smaller_precision_is_written_and_alpha_stays_exact(dtype, tmp_path):
    settings = Lora(rank=2, alpha=3.3)
    pipe, weights = bound(pipeline, settings)
    file, _ = read(kohya(weights, settings, dtype, "x"))
    assert {v.dtype for k, v in file.items() if "lora_" in k.split(".")[1]} == {dtype}
    assert {v.item() for k, v in file.items() if k.endswith("alpha")} == {np.float32(3.3)}
    tensors, _ = read(diffusers(weights, settings, dtype))
    assert {v.dtype for v in tensors.values()} == {dtype}
    drawn = load(pipeline(), tmp_path, diffusers(weights, settings, dtype))
    assert difference(drawn, pictures(pipe)) < 0.05


def test_a_value_that_overflows_is_refused():
    _, weights = bound(pipeline, SETTINGS)
    name = next(n for n in weights if "lora_B" in n)
    weights[name] = np.full_like(weights[name], 1e5)
    for export in (diffusers, lambda *a: kohya(*a, "x")):
        with pytest.raises(ConfigError, match="float16 cannot hold: use --dtype bfloat16"):
            export(weights, SETTINGS, torch.float16)
    with pytest.raises(ConfigError, match="float16 cannot hold"):
        merge(pipeline().unet, weights, SETTINGS, torch.float16)


def test_a_lora_of_another_model_is_not_merged():
    _, weights = bound(sdxl, SETTINGS)
    with pytest.raises(ConfigError, match="does not fit the model: down_blocks"):
        merge(pipeline().unet, weights, SETTINGS, FULL)


def test_the_parts_of_a_module_come_together():
    _, weights = bound(pipeline, SETTINGS)
    found = list(lora_export.updates(weights))
    assert 2 * len(found) == len(weights)
    assert all(down.shape[0] == up.shape[1] == 2 for _, down, up in found)
