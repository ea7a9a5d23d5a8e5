"""Stage ``evaluate``: measures the shipped weights."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from b2ray.shapes.build.common import Settings, begin, draw_captions, to_tensor
from b2ray.shapes.build.contrast import embed_images, embed_texts, same_scene
from b2ray.shapes.build.facts import record
from b2ray.shapes.captions import Caption, all_captions, near_misses
from b2ray.shapes.judge import Judge
from b2ray.shapes.render import render_batch

PICTURES, SAMPLES, BATCH = 4_000, 1_536, 64


def build(settings: Settings) -> None:
    """Writes ``facts/evaluate.json`` and a picture of samples, ``base/samples.png``."""
    rng = begin(settings, 5)
    pipe = load_pipeline(settings)
    clip = CLIPModel.from_pretrained(settings.reward).eval()
    tokenizer = CLIPTokenizer.from_pretrained(settings.reward)
    captions = draw_captions(settings.count(SAMPLES, 16), rng)
    careful = sample(pipe, captions, steps=20, guidance=3.0, eta=0.0, seed=settings.seed)
    loose = sample(pipe, captions, steps=10, guidance=2.0, eta=1.0, seed=settings.seed)
    judge, texts = Judge(), [caption.text for caption in captions]
    right, right_loose = judge.score(careful, texts), judge.score(loose, texts)
    scores = reward_scores(clip, tokenizer, loose, texts)
    record(
        settings,
        "evaluate",
        {
            "samples": len(captions),
            "judged_20_steps_guidance_3_eta_0": float(right.mean()),
            "judged_10_steps_guidance_2_eta_1": float(right_loose.mean()),
            "reward_auc": area_under_curve(scores, right_loose),
            "reward_cosine_mean": float(scores.mean()),
            "reward_cosine_deciles": np.quantile(scores, np.arange(0.1, 1, 0.1)).tolist(),
            **_judge_figures(settings, rng),
            **_reward_figures(clip, tokenizer, settings, rng),
            **_times(pipe, clip),
        },
    )
    _sheet(loose[:48]).save(settings.out / "samples.png", optimize=True)


def load_pipeline(settings: Settings) -> StableDiffusionPipeline:
    """The base model as users load it, with its progress bar off."""
    pipe = StableDiffusionPipeline.from_pretrained(settings.base)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: StableDiffusionPipeline,
    captions: Sequence[Caption],
    *,
    steps: int,
    guidance: float,
    eta: float,
    seed: int,
) -> np.ndarray:
    """One sample per caption, drawn with stochastic (``eta`` 1) or plain (0) DDIM.

    Returns:
        uint8 ``(N, 32, 32, 3)``.
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in tqdm(range(0, len(captions), BATCH), desc=f"{steps} steps", mininterval=2):
        images = pipe(
            [caption.text for caption in captions[start : start + BATCH]],
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=eta,
            generator=generator,
            output_type="np",
        ).images
        out.append((images * 255).round().astype(np.uint8))
    return np.concatenate(out)


@torch.no_grad()
def reward_scores(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: np.ndarray, texts: Sequence[str]
) -> np.ndarray:
    """Cosine of each picture and its caption, float32 ``(N,)``."""
    parts = [
        (
            embed_images(clip, to_tensor(images[i : i + 256]))
            * embed_texts(clip, tokenizer, texts[i : i + 256])
        ).sum(1)
        for i in range(0, len(texts), 256)
    ]
    return torch.cat(parts).numpy()


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """How often a right picture scores above a wrong one; ties count half."""
    good, bad = scores[right > 0.5], scores[right < 0.5]
    if not len(good) or not len(bad):
        return float("nan")
    above = (good[:, None] > bad[None, :]).mean()
    level = (good[:, None] == bad[None, :]).mean()
    return float(above + level / 2)


def _judge_figures(settings: Settings, rng: np.random.Generator) -> dict[str, float]:
    captions = draw_captions(settings.count(PICTURES, 16), rng)
    pictures = render_batch(captions, settings.seed + 5)
    judge, other = Judge(), [near_misses(caption, rng)[rng.integers(5)] for caption in captions]
    return {
        "judge_accepts_renders": float(judge.score(pictures, [c.text for c in captions]).mean()),
        "judge_accepts_near_misses": float(judge.score(pictures, [c.text for c in other]).mean()),
    }


@torch.no_grad()
def _reward_figures(
    clip: CLIPModel, tokenizer: CLIPTokenizer, settings: Settings, rng: np.random.Generator
) -> dict[str, float]:
    """Top-1 of fresh pictures among the captions of 500 scenes and among all 1 740 scenes, and
    how often the caption beats all its five near misses."""
    everything = [c for c in all_captions() if c.scene == c]
    order = rng.permutation(len(everything))[: settings.count(500, 8)]
    captions = [everything[i] for i in order]
    images = embed_images(clip, to_tensor(render_batch(captions, settings.seed + 51)))
    texts = embed_texts(clip, tokenizer, [c.text for c in captions])
    world = embed_texts(clip, tokenizer, [c.text for c in everything])
    told = same_scene(captions, everything)
    best = (images @ world.T).argmax(1, keepdim=True)
    near = [near_misses(c, rng) for c in captions]
    wrong = torch.stack([embed_texts(clip, tokenizer, [n.text for n in group]) for group in near])
    own = (images * texts).sum(1, keepdim=True)
    return {
        "reward_top1_of_500": float(
            ((images @ texts.T).argmax(1) == torch.arange(len(captions))).float().mean()
        ),
        "reward_top1_of_1740": float(told.gather(1, best).float().mean()),
        "reward_beats_near_misses": float(
            (own > torch.einsum("nd,nkd->nk", images, wrong)).all(1).float().mean()
        ),
    }


@torch.no_grad()
def _times(pipe: StableDiffusionPipeline, clip: CLIPModel) -> dict[str, float]:
    """Milliseconds per picture on one thread, batch 32, the median of seven."""
    latents, text = torch.randn(32, 4, 8, 8), torch.randn(32, 12, 64)
    images = torch.randn(32, 3, 32, 32)

    def median(call: object) -> float:
        spans = []
        for _ in range(7):
            started = time.perf_counter()
            call()  # type: ignore[operator]
            spans.append(time.perf_counter() - started)
        return float(np.median(spans) / 32 * 1e3)

    return {
        "unet_forward_ms": median(lambda: pipe.unet(latents, 500, text)),
        "vae_decode_ms": median(lambda: pipe.vae.decode(latents)),
        "reward_image_ms": median(lambda: embed_images(clip, images)),
    }


def _sheet(images: np.ndarray) -> Image.Image:
    """Up to 48 pictures in rows of 12, three times as large."""
    rows, columns = max(1, len(images) // 12), min(12, len(images))
    grid = images[: rows * columns].reshape(rows, columns, 32, 32, 3)
    flat = grid.transpose(0, 2, 1, 3, 4).reshape(rows * 32, columns * 32, 3)
    return Image.fromarray(flat).resize((columns * 96, rows * 96), Image.Resampling.NEAREST)
