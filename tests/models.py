"""Small models of the real classes, with random weights, for tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from b2ray.config import Config
from b2ray.config.load import parse
from b2ray.diffusion import lora_file
from b2ray.diffusion.noise import INITIAL, PREFIX, Domain, normal
from b2ray.diffusion.policy import Policy
from b2ray.diffusion.trajectory import Selected, Trajectory, to_wire
from b2ray.tracking.folder import RunState, open_run
from tools.shapes.words import make_tokenizer

PROMPTS = [
    "a red circle above a blue square",
    "a green circle above a red square",
    "a blue circle below a red square",
]


def tokenizer() -> CLIPTokenizer:
    return make_tokenizer()


def text_config() -> CLIPTextConfig:
    tokens = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokens.model_max_length,
        projection_dim=16,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


# The schedule that Stable Diffusion 1.x, 2.x and XL were trained with.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
ZERO_SNR = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
}


def vae() -> AutoencoderKL:
    """Pictures at twice the latents' size."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )


def pipeline(seed: int = 0, **scheduler: object) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline for 16 × 16 pictures on 8 × 8 latents."""
    torch.manual_seed(seed)
    own = {"clip_sample": False, "set_alpha_to_one": False}
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(**{**SCHEDULER, **own, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(seed: int = 0, *, force_zeros: bool = True) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline of XL's layout for 16 × 16 pictures on 8 × 8 latents."""
    torch.manual_seed(seed)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config()),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 3),
            cross_attention_dim=32,  # both encoders side by side
            attention_head_dim=(2, 2, 4),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULER, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def clip(seed: int = 0) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP model for 16 × 16 pictures."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = CLIPConfig(
        text_config=text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPModel(config), CLIPProcessor(images, tokenizer())


def save_all(folder: Path) -> None:
    """`base`, `reward` and `prompts.txt` in a folder."""
    pipeline().save_pretrained(folder / "base")
    model, processor = clip()
    model.save_pretrained(folder / "reward")
    processor.save_pretrained(folder / "reward")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


def arguments(models: Path, runs: Path, name: str, **over: object) -> list[str]:
    """A command line for a run of seconds on these models."""
    values: dict[str, object] = {
        "runs": runs,
        "name": name,
        "model.path": models / "base",
        "prompts.train": models / "prompts.txt",
        "prompts.heldout": models / "prompts.txt",
        "sampling.steps": 4,
        "sampling.guidance": 2.0,
        "curriculum.stages": 3,
        "curriculum.start": 2,
        "branching.images": 12,
        "branching.branches": 3,
        "branching.unit_groups": 2,
        "branching.branch_batch": 4,
        "learner.batch": 4,
        "learner.microbatch": 8,
        "learner.lr": 1e-3,
        "evaluation.every": 2,
        "evaluation.images": 6,
        "evaluation.final_images": 6,
        "evaluation.batch": 4,
        "evaluation.previews": 3,
        "evaluation.heldout_rewards": "[]",
        "rewards": f'[{{"name":"clip","kind":"clip","path":"{models / "reward"}"}}]',
        **{k.replace("__", "."): v for k, v in over.items()},
    }
    base = Path(__file__).with_name("small.yaml")
    return [f"--config={base}", *(f"--{k}={v}" for k, v in values.items())]


def config(models: Path, **over: object) -> Config:
    """The configuration of such a run; `section__field=value`."""
    return _parsed(tuple(arguments(models, models / "runs", "test", **over)))


@lru_cache(maxsize=1000)
def _parsed(words: tuple[str, ...]) -> Config:
    """Parsing takes as long as an update on these models, and a configuration is frozen."""
    return parse(words).config


def rollout(policy: Policy, prompts: list[str], interval: int, stage: int = 0) -> list[Trajectory]:
    """One branch a prompt from noise to image, and its interval as a sampler records it."""
    leaves = [(group, PREFIX + 1) for group in range(len(prompts))]

    def noise(step: int) -> np.ndarray:
        return normal(0, Domain.TRAIN, stage, leaves, step + 1, policy.latent_shape)

    fork = policy.schedule.steps - interval
    x = torch.from_numpy(noise(INITIAL - 1))
    x = policy.denoise(x, prompts, 0, fork, noise).latents[:, -1]
    branches = policy.denoise(x, prompts, fork, policy.schedule.steps, noise)
    return [
        Trajectory(to_wire(latents), log_probs.numpy(), 0)
        for latents, log_probs in zip(branches.latents, branches.log_probs, strict=True)
    ]


def selection(
    trajectories: list[Trajectory], prompts: list[str], advantages: list[float]
) -> list[Selected]:
    """Trajectories as the learner gets them."""
    return [
        Selected(prompt, advantage, len(trajectory.log_probs), lambda t=trajectory: t)
        for trajectory, prompt, advantage in zip(trajectories, prompts, advantages, strict=True)
    ]


def random_lora(shapes: lora_file.State, seed: int = 1) -> dict[str, np.ndarray]:
    """A LoRA of these names and shapes that changes pictures plainly."""
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.4, v.shape).astype(np.float32) for n, v in shapes.items()}


def trained_run(
    models: Path,
    runs: Path,
    name: str,
    *stages: lora_file.State,
    finished: bool = True,
    **over: object,
) -> Path:
    """A run's folder as it is after its last commits, with the LoRA of each; returns it."""
    settings = parse(arguments(models, runs, name, **over)).config
    with open_run(settings) as folder:
        first = settings.curriculum.stages - len(stages) + 1 if finished else 1
        for stage, weights in enumerate(stages, first):
            folder.commit(RunState(stage), weights, {})
        if finished:
            lora_file.save(folder.lora, stages[-1], settings.model.lora)
            folder.summary_file.write_text("{}")
    return folder.path
