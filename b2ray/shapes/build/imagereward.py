"""Stage ``imagereward``: a small ImageReward, in the released file's own names.

Trained as that one is, by comparisons (Bradley and Terry): of two pictures of one prompt the
better one wins. The worse one shows a near miss, or is broken or degraded. Prompts of one picture
are compared too: the caption wins against its near misses. The released model starts from a BLIP
that has learnt to see; this one starts from nothing, so its vision model learns beside the
comparisons to name what is drawn, without which it hardly gets beyond telling clean from broken.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, softplus
from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig, CLIPTokenizer

from b2ray.rewards.imagereward import MEAN, STD, Network, released
from b2ray.shapes.build.common import Settings, begin, draw_captions, replacing, to_tensor, train
from b2ray.shapes.build.contrast import normalise
from b2ray.shapes.build.degrade import degrade
from b2ray.shapes.build.evaluate import area_under_curve, load_pipeline, sample
from b2ray.shapes.build.facts import record
from b2ray.shapes.build.families import Family, draw_families, draw_pictures
from b2ray.shapes.build.words import CONTEXT, make_tokenizer
from b2ray.shapes.captions import COLOURS, SHAPES, Caption
from b2ray.shapes.judge import Judge

STEPS, FAMILIES_PER_STEP, FAMILIES, RATE, SAMPLES = 2_000, 16, 5_000, 1e-3, 1_536
WIDTH, HEADS, VISION_LAYERS, TEXT_LAYERS, HEAD_WIDTHS = 80, 4, 3, 3, (80, 64, 32, 16, 8, 1)
PATCH = 8  # with 4 a step takes longer and teaches less
WRONG = 2  # near misses of a caption in one step, of its five
NOISE = 0.06  # largest standard deviation of pixel noise, pictures from −1 to 1
DEGRADED = (0.4, 1.0)  # strengths of degradations
_NAMES = (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), 2)
MIX = 512  # families that the scores are standardised over


def build(settings: Settings) -> None:
    """Trains the network and saves it with its tokenizer in ``imagereward``."""
    started = time.perf_counter()
    rng = begin(settings, 8)
    vae = AutoencoderKL.from_pretrained(settings.base / "vae").eval()
    tokenizer = make_tokenizer()
    network = _network(len(tokenizer))
    families = draw_families(settings.count(FAMILIES, 2 * FAMILIES_PER_STEP), rng)
    pictures = _pictures(families, vae, rng)
    names = torch.nn.Linear(WIDTH, sum(_NAMES))

    def loss_of(step: int) -> torch.Tensor:
        picked = rng.choice(len(families), FAMILIES_PER_STEP, replace=False)
        images = to_tensor(pictures[picked].reshape(-1, 32, 32, 3))
        images = images + NOISE * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
        seen = network.vision(pixel_values=normalise(images)).last_hidden_state
        some = [families[i] for i in picked]
        scores = _read(network, tokenizer, seen, some, rng)
        told = names(seen[:, 0]).view(len(some), 3, -1)[:, :2].flatten(0, 1)
        naming = _naming(told, [caption for family in some for caption in family.captions])
        # each side's right pair against the wrong ones of the same prompt or the same picture
        return softplus(scores[:, :, 1:] - scores[:, :, :1]).mean() + naming

    steps = settings.count(STEPS)
    parameters = list(network.parameters())
    loss = train("imagereward", [*parameters, *names.parameters()], steps, RATE, loss_of)
    network.eval()
    some = rng.choice(len(families), min(MIX, len(families)), replace=False)
    _standardise(network, tokenizer, pictures[some], [families[i] for i in some], rng)
    _save(network, tokenizer, settings)
    minutes = (time.perf_counter() - started) / 60
    record(
        settings,
        "imagereward",
        {
            "steps": steps,
            "loss": loss,
            "parameters": sum(p.numel() for p in parameters),
            "minutes": minutes,
            **_figures(network, tokenizer, settings, rng),
        },
    )


def _network(words: int) -> Network:
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
        "initializer_range": 0.08,
    }
    vision = BlipVisionConfig(
        **shared,
        num_hidden_layers=VISION_LAYERS,
        image_size=32,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        **shared,
        num_hidden_layers=TEXT_LAYERS,
        encoder_hidden_size=WIDTH,
        vocab_size=words,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        sep_token_id=None,
    )
    network = Network(vision, text, HEAD_WIDTHS)
    for layer in network.head:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.orthogonal_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    network.head.eval()  # without dropout, which is meant for the real head's 1 024 numbers
    return network


def _pictures(families: list[Family], vae: AutoencoderKL, rng: np.random.Generator) -> np.ndarray:
    """uint8 ``(families, 3, 32, 32, 3)``: of the caption, of its near miss, and a bad one: broken,
    or a degraded picture of the caption."""
    pictures = draw_pictures(families, vae, rng)
    some = np.flatnonzero(rng.random(len(families)) < 0.4)
    pictures[some, 2] = degrade(pictures[some, 0], rng.uniform(*DEGRADED, len(some)), vae, rng)
    return pictures


def _read(
    network: Network,
    tokenizer: CLIPTokenizer,
    seen: torch.Tensor,
    families: Sequence[Family],
    rng: np.random.Generator,
) -> torch.Tensor:
    """Raw scores ``(families, 2, 3 + WRONG)``: of each side's caption on its own picture, on the
    other side's and on the bad one, and of its near misses on its own picture.

    Args:
        seen: the vision model's tokens of `_pictures`, ``(3 · families, patches + 1, width)``.
    """
    rows, texts = [], []
    for i, family in enumerate(families):
        for side in (0, 1):
            wrong = family.wrong[side]
            near = [wrong[j] for j in rng.permutation(len(wrong))[:WRONG]]
            rows += [3 * i + side, 3 * i + 1 - side, 3 * i + 2, *[3 * i + side] * WRONG]
            texts += [c.text for c in (*[family.captions[side]] * 3, *near)]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    scores = network.read(seen[rows], tokens.input_ids, tokens.attention_mask)
    return scores.view(len(families), 2, 3 + WRONG)


def _naming(told: torch.Tensor, captions: Sequence[Caption]) -> torch.Tensor:
    """Mean cross-entropy of each scene's colours, shapes and direction.

    Args:
        told: logits ``(captions, sum(_NAMES))``.
    """
    scenes = [caption.scene for caption in captions]
    colours, shapes = list(COLOURS), list(SHAPES)
    right = torch.tensor(
        [
            (
                colours.index(scene.first.colour),
                shapes.index(scene.first.shape),
                colours.index(scene.second.colour),
                shapes.index(scene.second.shape),
                int(scene.relation == "above"),
            )
            for scene in scenes
        ]
    )
    parts = zip(told.split(_NAMES, dim=1), right.T, strict=True)
    return torch.stack([cross_entropy(logits, target) for logits, target in parts]).mean()


@torch.no_grad()
def _standardise(
    network: Network,
    tokenizer: CLIPTokenizer,
    pictures: np.ndarray,
    families: Sequence[Family],
    rng: np.random.Generator,
) -> None:
    """Changes the last layer so that after ImageReward's own constants the mix of training has
    mean 0 and standard deviation 1."""
    parts = []
    for i in range(0, len(families), 64):
        images = to_tensor(pictures[i : i + 64].reshape(-1, 32, 32, 3))
        seen = network.vision(pixel_values=normalise(images)).last_hidden_state
        parts.append(_read(network, tokenizer, seen, families[i : i + 64], rng))
    raw = torch.cat(parts)
    last = network.head[-1]
    assert isinstance(last, torch.nn.Linear)
    factor = STD / raw.std()
    last.weight *= factor
    last.bias.copy_((last.bias - raw.mean()) * factor + MEAN)


def _save(network: Network, tokenizer: CLIPTokenizer, settings: Settings) -> None:
    with replacing(settings.imagereward) as folder:
        tensors = {released(k): v for k, v in network.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        vision, text = network.vision.config.to_dict(), network.text.config.to_dict()
        BlipConfig(vision_config=vision, text_config=text).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def _figures(
    network: Network, tokenizer: CLIPTokenizer, settings: Settings, rng: np.random.Generator
) -> dict[str, float]:
    """Against the judge, on the base model's samples."""
    captions = draw_captions(settings.count(SAMPLES, 16), rng)
    texts = [caption.text for caption in captions]
    images = sample(
        load_pipeline(settings), captions, steps=10, guidance=2.0, eta=1.0, seed=settings.seed + 8
    )
    right = Judge().score(images, texts)
    parts = []
    for i in range(0, len(texts), 256):
        tokens = tokenizer(texts[i : i + 256], padding="max_length", return_tensors="pt")
        pixels = normalise(to_tensor(images[i : i + 256]))
        parts.append(network(pixels, tokens.input_ids, tokens.attention_mask))
    scores = ((torch.cat(parts) - MEAN) / STD).numpy()
    return {
        "samples": len(texts),
        "auc": area_under_curve(scores, right),
        "samples_mean": float(scores.mean()),
        "samples_std": float(scores.std()),
    }
