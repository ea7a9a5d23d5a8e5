"""open_clip's checkpoints as CLIPModels, against a CLIP written here in open_clip's form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor

from b2ray.config import Reward
from b2ray.errors import ConfigError
from b2ray.rewards import load
from b2ray.rewards.hps import build, to_clip_model
from tests.models import PROMPTS, clip, tokenizer

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, width * 4), nn.Linear(width * 4, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, size: int, patch: int, width: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, 4, 3)
        self.proj = nn.Parameter(torch.empty(width, dim))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Two transformers, a picture's and a text's; every weight random."""

    def __init__(self, words: int, context: int, width: int = 24, dim: int = 20) -> None:
        super().__init__()
        self.visual = Visual(24, 8, 32, dim)
        self.transformer = Transformer(width, 3, 2)
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        causal = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, causal))
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


@pytest.fixture(scope="module")
def theirs() -> OpenClip:
    torch.manual_seed(0)
    words = tokenizer()
    return OpenClip(len(words), words.model_max_length).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """Configuration, tokenizer and image processor, without weights."""
    folder = tmp_path_factory.mktemp("processor")
    small = clip()[0].config
    text = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "image_size": 24}
    CLIPConfig(
        projection_dim=20,
        text_config={
            **small.text_config.to_dict(), **text, "intermediate_size": 96, "hidden_act": "gelu"
        },
        vision_config={
            **small.vision_config.to_dict(), **vision, "intermediate_size": 128,
            "hidden_act": "gelu",
        },
    ).save_pretrained(folder)  # fmt: skip
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def spec(path, processor, **options: str) -> Reward:
    options = {"processor": str(processor), **options}
    return Reward(name="hps", kind="hps", path=str(path), options=options)


def converted(theirs, processor):
    return build(CLIPConfig.from_pretrained(processor), to_clip_model(theirs.state_dict()))


def test_the_picture_side_is_open_clips(theirs, processor):
    pixels = torch.randn(4, 3, 24, 24)
    with torch.no_grad():
        ours = converted(theirs, processor).get_image_features(pixel_values=pixels).pooler_output
    assert (ours - theirs.visual(pixels)).abs().max() < 1e-5


def test_the_text_side_is_open_clips(theirs, processor):
    words = tokenizer()
    tokens = words(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = converted(theirs, processor).get_text_features(input_ids=tokens).pooler_output
    assert (ours - theirs.encode_text(tokens)).abs().max() < 1e-5


def expected_scores(theirs, processor) -> np.ndarray:
    pictures = [Image.fromarray(i) for i in IMAGES]
    images = CLIPImageProcessor.from_pretrained(processor)(pictures, return_tensors="pt")
    tokens = tokenizer()(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    cosines = nn.functional.cosine_similarity
    return cosines(theirs.visual(images.pixel_values), theirs.encode_text(tokens)).numpy()


@pytest.mark.parametrize("form", ["nested half", "wrapped", "safetensors"])
def test_scores_are_cosines_whatever_the_file(theirs, processor, tmp_path, form):
    tensors = theirs.state_dict()
    tolerance = 1e-5
    if form == "nested half":
        halves = {name: tensor.half() for name, tensor in tensors.items()}
        torch.save({"epoch": 3, "state_dict": halves}, tmp_path / "small.pt")
        tolerance = 5e-3
    elif form == "wrapped":
        torch.save({f"module.{n}": t for n, t in tensors.items()}, tmp_path / "small.pt")
    else:
        (tmp_path / "small.pt").write_text("not read")
        save_file({f"model.{n}": t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    reward = load(spec(tmp_path, processor, file="small.pt"), CPU)
    found = reward.score(IMAGES, PROMPTS)
    np.testing.assert_allclose(found, expected_scores(theirs, processor), atol=tolerance)
    assert reward.embed(IMAGES).shape == (3, 20)


def without(tensors: dict, key: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {**t, "head.bias": t["logit_scale"]}, "its key 'head.bias' is unknown"),
        (
            lambda t: {**t, "transformer.resblocks.0.ln_3.weight": t["logit_scale"]},
            r"its key 'transformer\.resblocks\.0\.ln_3\.weight' is unknown",
        ),
        (lambda t: without(t, "visual.proj"), r"its visual_projection\.weight is missing"),
        (
            lambda t: without(t, "transformer.resblocks.1.attn.in_proj_bias"),
            r"its text_model\.encoder\.layers\.1\.self_attn\.k_proj\.bias is missing",
        ),
        (
            lambda t: {**t, "visual.transformer.resblocks.7.ln_1.weight": torch.ones(32)},
            r"layers\.7\.layer_norm1\.weight has no place in options\.processor's model",
        ),
        (
            lambda t: {**t, "positional_embedding": t["positional_embedding"][:-1].clone()},
            r"position_embedding\.weight has shape \(11, 24\), options\.processor's model \(12",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(theirs, processor, tmp_path, change, words):
    torch.save(change(theirs.state_dict()), tmp_path / "small.pt")
    with pytest.raises(ConfigError, match=rf"reward 'hps': .* as open_clip weights: .*{words}"):
        load(spec(tmp_path, processor, file="small.pt"), CPU)


class Surprise:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_but_tensors_is_unpickled(processor, tmp_path, capsys):
    torch.save({"state_dict": Surprise()}, tmp_path / "small.pt")
    with pytest.raises(ConfigError, match="reward 'hps'"):
        load(spec(tmp_path, processor, file="small.pt"), CPU)
    assert "unpickled" not in capsys.readouterr().out


def test_a_folder_without_weights_names_both_files(processor, tmp_path):
    words = r"neither model\.safetensors nor HPS_v2\.1_compressed\.pt \(options\.file\)"
    with pytest.raises(ConfigError, match=words):
        load(spec(tmp_path, processor), CPU)
