"""Stage ``evaluate`` measures the base model, the judge and the reward."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from b2ray.shapes.captions import Caption, all_captions, near_misses
from b2ray.shapes.judge import Judge
from b2ray.shapes.render import render_batch
from tools.shapes.common import Settings, begin, draw_captions, to_tensor
from tools.shapes.contrast import embed_images, embed_texts, same_scene
from tools.shapes.facts import record

PICTURES, SAMPLES, BATCH = 4_000, 1_536, 64


def build(settings: Settings) -> None:
    """Write ``facts/evaluate.json``, and ``samples.png`` with samples of the base model."""
    rng = begin(settings, 5)
    pipeline = load_pipeline(settings)
    clip = CLIPModel.from_pretrained(settings.reward).eval()
    tokenizer = CLIPTokenizer.from_pretrained(settings.reward)
    captions = draw_captions(settings.count(SAMPLES, 16), rng)
    deterministic = sample(pipeline, captions, steps=20, guidance=3.0, eta=0.0, seed=settings.seed)
    stochastic = sample(pipeline, captions, steps=10, guidance=2.0, eta=1.0, seed=settings.seed)
    judge, texts = Judge(), [caption.text for caption in captions]
    right = judge.score(deterministic, texts)
    right_stochastic = judge.score(stochastic, texts)
    scores = reward_scores(clip, tokenizer, stochastic, texts)
    record(
        settings,
        "evaluate",
        {
            "samples": len(captions),
            "judged_20_steps_guidance_3_eta_0": float(right.mean()),
            "judged_10_steps_guidance_2_eta_1": float(right_stochastic.mean()),
            "reward_auc": area_under_curve(scores, right_stochastic),
            "reward_cosine_mean": float(scores.mean()),
            "reward_cosine_deciles": np.quantile(scores, np.arange(0.1, 1, 0.1)).tolist(),
            **_judge_figures(settings, rng),
            **_reward_figures(clip, tokenizer, settings, rng),
            **_times(pipeline, clip),
        },
    )
    _contact_sheet(stochastic[:48]).save(settings.out / "samples.png", optimize=True)


def load_pipeline(settings: Settings) -> StableDiffusionPipeline:
    """The base model as users load it, without its progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(settings.base)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[Caption],
    *,
    steps: int,
    guidance: float,
    eta: float,
    seed: int,
) -> np.ndarray:
    """Sample a picture for each caption with DDIM.

    Args:
        pipeline: the base model.
        captions: the captions.
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance.
        eta: stochasticity, from 0 (deterministic) to 1.
        seed: seed of the noise.

    Returns:
        uint8 ``(N, 32, 32, 3)``.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in tqdm(range(0, len(captions), BATCH), desc=f"{steps} steps", mininterval=2):
        images = pipeline(
            [caption.text for caption in captions[start : start + BATCH]],
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=eta,
            generator=generator,
            output_type="np",
        ).images
        parts.append((images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


@torch.no_grad()
def reward_scores(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: np.ndarray, texts: Sequence[str]
) -> np.ndarray:
    """The cosine between the embeddings of each picture and its caption, float32 ``(N,)``."""
    parts = [
        (
            embed_images(clip, to_tensor(images[i : i + 256]))
            * embed_texts(clip, tokenizer, texts[i : i + 256])
        ).sum(1)
        for i in range(0, len(texts), 256)
    ]
    return torch.cat(parts).numpy()


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """The probability that a right picture scores above a wrong one, where ties count half.

    Args:
        scores: score of each picture, ``(N,)``.
        right: 1 for right and 0 for wrong pictures, ``(N,)``.

    Returns:
        The area under the receiver operating characteristic; NaN if all pictures are alike.
    """
    positive, negative = scores[right > 0.5], scores[right < 0.5]
    if not len(positive) or not len(negative):
        return float("nan")
    above = (positive[:, None] > negative[None, :]).mean()
    tied = (positive[:, None] == negative[None, :]).mean()
    return float(above + tied / 2)


def _judge_figures(settings: Settings, rng: np.random.Generator) -> dict[str, float]:
    """How often the judge accepts rendered pictures with their caption, and with a near miss."""
    captions = draw_captions(settings.count(PICTURES, 16), rng)
    pictures = render_batch(captions, settings.seed + 5)
    judge = Judge()
    wrong = [near_misses(caption, rng)[rng.integers(5)] for caption in captions]
    return {
        "judge_accepts_renders": float(judge.score(pictures, [c.text for c in captions]).mean()),
        "judge_accepts_near_misses": float(judge.score(pictures, [c.text for c in wrong]).mean()),
    }


@torch.no_grad()
def _reward_figures(
    clip: CLIPModel, tokenizer: CLIPTokenizer, settings: Settings, rng: np.random.Generator
) -> dict[str, float]:
    """How well the reward recognises the captions of rendered pictures.

    The figures are the top-1 accuracy among the captions of 500 scenes and among those of all 1 740
    scenes, and how often the caption scores above all of its five near misses.
    """
    all_scenes = [c for c in all_captions() if c.scene == c]
    order = rng.permutation(len(all_scenes))[: settings.count(500, 8)]
    captions = [all_scenes[i] for i in order]
    images = embed_images(clip, to_tensor(render_batch(captions, settings.seed + 51)))
    texts = embed_texts(clip, tokenizer, [c.text for c in captions])
    all_texts = embed_texts(clip, tokenizer, [c.text for c in all_scenes])
    matches = same_scene(captions, all_scenes)
    best = (images @ all_texts.T).argmax(1, keepdim=True)
    near = [near_misses(c, rng) for c in captions]
    wrong = torch.stack([embed_texts(clip, tokenizer, [n.text for n in group]) for group in near])
    own = (images * texts).sum(1, keepdim=True)
    return {
        "reward_top1_of_500": float(
            ((images @ texts.T).argmax(1) == torch.arange(len(captions))).float().mean()
        ),
        "reward_top1_of_1740": float(matches.gather(1, best).float().mean()),
        "reward_beats_near_misses": float(
            (own > torch.einsum("nd,nkd->nk", images, wrong)).all(1).float().mean()
        ),
    }


@torch.no_grad()
def _times(pipeline: StableDiffusionPipeline, clip: CLIPModel) -> dict[str, float]:
    """Milliseconds per picture on one thread with a batch of 32, medians of seven calls."""
    latents, text = torch.randn(32, 4, 8, 8), torch.randn(32, 12, 64)
    images = torch.randn(32, 3, 32, 32)

    def median(call: object) -> float:
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            call()  # type: ignore[operator]
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds) / 32 * 1e3)

    return {
        "unet_forward_ms": median(lambda: pipeline.unet(latents, 500, text)),
        "vae_decode_ms": median(lambda: pipeline.vae.decode(latents)),
        "reward_image_ms": median(lambda: embed_images(clip, images)),
    }


def _contact_sheet(images: np.ndarray) -> Image.Image:
    """Up to 48 pictures in rows of 12, enlarged three times."""
    rows, columns = max(1, len(images) // 12), min(12, len(images))
    grid = images[: rows * columns].reshape(rows, columns, 32, 32, 3)
    flat = grid.transpose(0, 2, 1, 3, 4).reshape(rows * 32, columns * 32, 3)
    return Image.fromarray(flat).resize((columns * 96, rows * 96), Image.Resampling.NEAREST)
