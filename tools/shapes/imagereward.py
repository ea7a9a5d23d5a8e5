"""Stage ``imagereward`` trains a small ImageReward with the keys of the released file.

As for the released model, the loss is that of Bradley and Terry on comparisons: of two pictures for
the same prompt, the better one should score higher. The worse one shows a near miss, or is broken
or degraded. Two prompts for the same picture are compared as well: its caption should score higher
than a near miss. The released model starts from a pretrained BLIP, but this one from random
weights. Therefore its vision model is also trained to classify what the pictures show; without that
it hardly learns more than to distinguish clean from broken pictures.
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
from b2ray.shapes.captions import COLOURS, SHAPES, Caption
from b2ray.shapes.judge import Judge
from tools.shapes.common import Settings, begin, draw_captions, replacing, to_tensor, train
from tools.shapes.contrast import normalise
from tools.shapes.degrade import degrade
from tools.shapes.evaluate import area_under_curve, load_pipeline, sample
from tools.shapes.facts import record
from tools.shapes.families import CaptionFamily, draw_families, draw_pictures
from tools.shapes.words import CONTEXT, make_tokenizer

STEPS, FAMILIES_PER_STEP, FAMILIES, RATE, SAMPLES = 2_000, 16, 5_000, 1e-3, 1_536
WIDTH, HEADS, VISION_LAYERS, TEXT_LAYERS, HEAD_WIDTHS = 80, 4, 3, 3, (80, 64, 32, 16, 8, 1)
PATCH = 8  # with 4 a step takes longer and the model learns less
WRONG = 2  # how many of the five near misses of a caption are compared in a step
NOISE = 0.06  # largest standard deviation of pixel noise, pictures from −1 to 1
DEGRADED = (0.4, 1.0)  # range of the strengths of degradations
MIX = 512  # families over which the scores are standardised
# Numbers of classes of a scene: two colours and shapes, and the direction.
_CLASSES = (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), 2)


def build(settings: Settings) -> None:
    """Train the network and save it with its tokenizer in ``imagereward``."""
    # The model and its data.
    start = time.perf_counter()
    rng = begin(settings, 8)
    vae = AutoencoderKL.from_pretrained(settings.base / "vae").eval()
    tokenizer = make_tokenizer()
    network = _network(len(tokenizer))
    families = draw_families(settings.count(FAMILIES, 2 * FAMILIES_PER_STEP), rng)
    pictures = _pictures(families, vae, rng)
    classifier = torch.nn.Linear(WIDTH, sum(_CLASSES))

    def loss_of(step: int) -> torch.Tensor:
        picked = rng.choice(len(families), FAMILIES_PER_STEP, replace=False)
        images = to_tensor(pictures[picked].reshape(-1, 32, 32, 3))
        images = images + NOISE * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
        states = network.vision(pixel_values=normalise(images)).last_hidden_state
        batch = [families[i] for i in picked]
        scores = _scores(network, tokenizer, states, batch, rng)
        logits = classifier(states[:, 0]).view(len(batch), 3, -1)[:, :2].flatten(0, 1)
        captions = [caption for family in batch for caption in family.captions]
        # Each caption with its own picture wins against wrong pictures and against near misses.
        return softplus(scores[:, :, 1:] - scores[:, :, :1]).mean() + _class_loss(logits, captions)

    # Training, standardisation, weights and figures.
    steps = settings.count(STEPS)
    parameters = list(network.parameters())
    loss = train("imagereward", [*parameters, *classifier.parameters()], steps, RATE, loss_of)
    network.eval()
    picked = rng.choice(len(families), min(MIX, len(families)), replace=False)
    _standardise(network, tokenizer, pictures[picked], [families[i] for i in picked], rng)
    _save(network, tokenizer, settings)
    minutes = (time.perf_counter() - start) / 60
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


def _network(vocabulary: int) -> Network:
    """A small network with random weights for a vocabulary of this size."""
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
        vocab_size=vocabulary,
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
    network.head.eval()  # without dropout, which suits the widths of the real head
    return network


def _pictures(
    families: list[CaptionFamily], vae: AutoencoderKL, rng: np.random.Generator
) -> np.ndarray:
    """Draw a picture of each family's caption, one of its near miss, and a bad one.

    The bad one is broken (see `draw_pictures`) or a degraded picture of the caption.

    Returns:
        uint8 ``(families, 3, 32, 32, 3)``, in this order.
    """
    pictures = draw_pictures(families, vae, rng)
    rows = np.flatnonzero(rng.random(len(families)) < 0.4)
    pictures[rows, 2] = degrade(pictures[rows, 0], rng.uniform(*DEGRADED, len(rows)), vae, rng)
    return pictures


def _scores(
    network: Network,
    tokenizer: CLIPTokenizer,
    states: torch.Tensor,
    families: Sequence[CaptionFamily],
    rng: np.random.Generator,
) -> torch.Tensor:
    """Compute the raw scores that are compared with each other.

    These are, for each of a family's two captions, the scores of the caption for its own picture,
    for the other caption's picture and for the bad picture, and the scores of its near misses for
    its own picture.

    Args:
        network: the network.
        tokenizer: its tokenizer.
        states: the vision model's hidden states of `_pictures`,
            ``(3 · families, patches + 1, width)``.
        families: the captions.
        rng: the generator that chooses near misses.

    Returns:
        ``(families, 2, 3 + WRONG)``, in this order.
    """
    rows, texts = [], []
    for i, family in enumerate(families):
        for side in (0, 1):
            wrong = family.wrong[side]
            near = [wrong[j] for j in rng.permutation(len(wrong))[:WRONG]]
            rows += [3 * i + side, 3 * i + 1 - side, 3 * i + 2, *[3 * i + side] * WRONG]
            texts += [c.text for c in (*[family.captions[side]] * 3, *near)]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    scores = network.read(states[rows], tokens.input_ids, tokens.attention_mask)
    return scores.view(len(families), 2, 3 + WRONG)


def _class_loss(logits: torch.Tensor, captions: Sequence[Caption]) -> torch.Tensor:
    """Mean cross-entropy of the colours, shapes and direction of scenes.

    Args:
        logits: ``(captions, sum(_CLASSES))``.
        captions: the caption of each scene.
    """
    scenes = [caption.scene for caption in captions]
    colours, shapes = list(COLOURS), list(SHAPES)
    targets = torch.tensor(
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
    parts = zip(logits.split(_CLASSES, dim=1), targets.T, strict=True)
    return torch.stack([cross_entropy(part, target) for part, target in parts]).mean()


@torch.no_grad()
def _standardise(
    network: Network,
    tokenizer: CLIPTokenizer,
    pictures: np.ndarray,
    families: Sequence[CaptionFamily],
    rng: np.random.Generator,
) -> None:
    """Rescale the last layer so that scores of the training data have mean 0 and deviation 1.

    This is after standardisation with ImageReward's own constants, which the reward applies.
    """
    parts = []
    for i in range(0, len(families), 64):
        images = to_tensor(pictures[i : i + 64].reshape(-1, 32, 32, 3))
        states = network.vision(pixel_values=normalise(images)).last_hidden_state
        parts.append(_scores(network, tokenizer, states, families[i : i + 64], rng))
    raw = torch.cat(parts)
    last = network.head[-1]
    assert isinstance(last, torch.nn.Linear)
    factor = STD / raw.std()
    last.weight *= factor
    last.bias.copy_((last.bias - raw.mean()) * factor + MEAN)


def _save(network: Network, tokenizer: CLIPTokenizer, settings: Settings) -> None:
    """Write the weights, the configuration and the tokenizer."""
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
    """Compare the scores with the judge, on samples of the base model."""
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
