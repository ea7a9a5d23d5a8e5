"""ImageReward: the released file's keys, and its score against BLIP written out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding, gelu, layer_norm, linear
from transformers import BertTokenizer, CLIPImageProcessor

from b2ray.config import Reward
from b2ray.errors import ConfigError
from b2ray.rewards import load
from tests.models import PROMPTS

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##n", "red", "green", "blue", "circle",
         "square", "above", "below"]  # fmt: skip
VOCABULARY = len(WORDS) + 2
WIDTH, TEXT, MLP, PATCH, PATCHES = 128, 64, 96, 8, 4  # heads of 64, as the released model's


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the released file's names, of every kind that it has."""
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def some(name: str, *shape: int, scale: float = 0.15, shift: float = 0.0) -> None:
        tensors[name] = torch.randn(*shape, generator=rng) * scale + shift

    def dense(name: str, rows: int, columns: int) -> None:
        some(f"{name}.weight", rows, columns)
        some(f"{name}.bias", rows)

    def norm(name: str, width: int) -> None:
        some(f"{name}.weight", width, shift=1.0)
        some(f"{name}.bias", width)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    some(f"{vision}.cls_token", 1, 1, WIDTH)
    some(f"{vision}.pos_embed", 1, PATCHES + 1, WIDTH)
    some(f"{vision}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    some(f"{vision}.patch_embed.proj.bias", WIDTH)
    for n in range(2):
        block = f"{vision}.blocks.{n}"
        norm(f"{block}.norm1", WIDTH)
        dense(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        dense(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        dense(f"{block}.mlp.fc1", MLP, WIDTH)
        dense(f"{block}.mlp.fc2", WIDTH, MLP)
    norm(f"{vision}.norm", WIDTH)
    some(f"{text}.embeddings.word_embeddings.weight", VOCABULARY, TEXT)
    some(f"{text}.embeddings.position_embeddings.weight", 40, TEXT)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for n in range(2):
        layer = f"{text}.encoder.layer.{n}"
        for attention, seen in (("attention", TEXT), ("crossattention", WIDTH)):
            dense(f"{layer}.{attention}.self.query", TEXT, TEXT)
            dense(f"{layer}.{attention}.self.key", TEXT, seen)
            dense(f"{layer}.{attention}.self.value", TEXT, seen)
            dense(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        dense(f"{layer}.intermediate.dense", MLP, TEXT)
        dense(f"{layer}.output.dense", TEXT, MLP)
        norm(f"{layer}.output.LayerNorm", TEXT)
    widths = (TEXT, 32, 16, 8, 4, 1)
    for i, place in enumerate((0, 2, 4, 6, 7)):
        some(f"mlp.layers.{place}.weight", widths[i + 1], widths[i], scale=0.5)
        some(f"mlp.layers.{place}.bias", widths[i + 1])
    # Known and not needed for a score:
    dense("blip.vision_proj", 8, WIDTH)
    dense("blip.text_proj", 8, TEXT)
    tensors[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask=None):
    """(N, tokens, width) each; mask (N, tokens of k) of ones and zeros."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def written_out(
    w: dict[str, torch.Tensor], pixels, ids, mask, heads: tuple[int, int] = (2, 1)
) -> torch.Tensor:
    """BLIP's vision transformer, its text encoder and the head on the released names, (N,)."""

    def dense(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    at = "blip.visual_encoder."
    bias = w[f"{at}patch_embed.proj.bias"]
    patches = torch.nn.functional.conv2d(
        pixels, w[f"{at}patch_embed.proj.weight"], bias, stride=PATCH
    )
    x = patches.flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{at}cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{at}pos_embed"]
    for n in range(2):
        block = f"{at}blocks.{n}."
        q, k, v = dense(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, dim=2)
        x = x + dense(f"{block}attn.proj", attend(q, k, v, heads[0]))
        hidden = gelu(dense(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6)))
        x = x + dense(f"{block}mlp.fc2", hidden)
    seen = norm(f"{at}norm", x, 1e-6)

    at = "blip.text_encoder."
    x = embedding(ids, w[f"{at}embeddings.word_embeddings.weight"])
    x = x + w[f"{at}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(f"{at}embeddings.LayerNorm", x, 1e-12)
    for n in range(2):
        layer = f"{at}encoder.layer.{n}."
        for kind, other, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            name, other = f"{layer}{kind}.", x if other is None else other
            q = dense(f"{name}self.query", x)
            k, v = dense(f"{name}self.key", other), dense(f"{name}self.value", other)
            mixed = dense(f"{name}output.dense", attend(q, k, v, heads[1], hidden))
            x = norm(f"{name}output.LayerNorm", mixed + x, 1e-12)
        hidden = gelu(dense(f"{layer}intermediate.dense", x))
        x = norm(f"{layer}output.LayerNorm", dense(f"{layer}output.dense", hidden) + x, 1e-12)
    x = x[:, 0]
    for place in (0, 2, 4, 6, 7):
        x = dense(f"mlp.layers.{place}", x)
    return x[:, 0]


def bert(folder: Path) -> str:
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    return bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(state(), folder / "ImageReward.pt")
    return folder


def imagereward(path: Path, tokenizer: str = "/nowhere", **options: str):
    options = {"tokenizer": tokenizer, **options}
    return load(Reward(name="liked", kind="imagereward", path=str(path), options=options), CPU)


@pytest.fixture(scope="module")
def reward(folder, words):
    return imagereward(folder, words)


def expected(words: str, images: np.ndarray, prompts: list[str], heads=(2, 1)) -> np.ndarray:
    """Everything the plain way: Pillow, BERT's tokenizer, the written-out network."""
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    inputs = processor([Image.fromarray(i) for i in images], return_tensors="pt")
    tokens = BertTokenizer.from_pretrained(words)(
        prompts, padding=True, truncation=True, max_length=35, return_tensors="pt"
    )
    raw = written_out(state(), inputs.pixel_values, tokens.input_ids, tokens.attention_mask, heads)
    return ((raw - 0.16717362830052426) / 1.0333394966054072).numpy()


def test_the_score_is_blip_written_out(reward, words):
    prompts = [PROMPTS[0], "a circle", "an unheard-of thing"]
    found = reward.score(IMAGES, prompts)
    assert (found.dtype, found.shape) == (np.float32, (3,))
    wanted = expected(words, IMAGES, prompts)
    assert wanted.std() > 0.01
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_pictures_of_another_size_are_resized_as_by_pillow(reward, words):
    images = RNG.integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    found = reward.score(images, PROMPTS)
    np.testing.assert_allclose(found, expected(words, images, PROMPTS), atol=2e-2)


def test_a_long_prompt_is_cut_at_35_tokens(reward, words):
    images, long = IMAGES[:2], " ".join(["red circle"] * 40)
    found = reward.score(images, [long, long + " above a square"])
    np.testing.assert_allclose(found, expected(words, images, [long] * 2), atol=2e-5)


def test_the_prompt_and_the_picture_both_count(reward):
    same = reward.score(IMAGES[[0, 0, 1]], [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert len(set(same.tolist())) == 3


def test_scores_are_the_same_again_and_alone(reward):
    assert not any(m.training for m in reward.network.modules())
    together = reward.score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(together, reward.score(IMAGES, PROMPTS))
    alone = [reward.score(IMAGES[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=2e-5)
    np.testing.assert_allclose(reward.score(IMAGES[::-1], PROMPTS[::-1])[::-1], together, atol=2e-5)


def test_a_safetensors_twin_scores_the_same(tmp_path, reward, words):
    save_file(state(), tmp_path / "model.safetensors")
    found = imagereward(tmp_path, words).score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, reward.score(IMAGES, PROMPTS))


def test_the_weights_may_have_another_name(tmp_path, reward, words):
    torch.save(state(), tmp_path / "other.pt")
    found = imagereward(tmp_path, words, file="other.pt").score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, reward.score(IMAGES, PROMPTS))


def test_a_configuration_beside_the_weights_tells_the_heads(tmp_path, words):
    torch.save(state(), tmp_path / "ImageReward.pt")
    config = {
        "vision_config": {"num_attention_heads": 4},
        "text_config": {"num_attention_heads": 8},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = imagereward(tmp_path, words).score(IMAGES, PROMPTS)
    np.testing.assert_allclose(found, expected(words, IMAGES, PROMPTS, heads=(4, 8)), atol=2e-5)
    assert np.abs(found - expected(words, IMAGES, PROMPTS)).max() > 1e-3


def test_bert_gets_blips_two_special_tokens(reward):
    places = reward.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    assert places == [VOCABULARY - 2, VOCABULARY - 1]


def test_a_folders_own_tokenizer_comes_first(tmp_path, reward):
    tokenizer = reward.tokenizer
    change(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = imagereward(tmp_path).score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, reward.score(IMAGES, PROMPTS))


# --- what does not load ----------------------------------------------------------------------


NEEDED = [k for k in state() if "_proj" not in k and "position_ids" not in k and ".1." not in k]


def test_every_key_is_needed(tmp_path, words):
    assert len(NEEDED) > 50
    assert [key for key in NEEDED if not is_missed(key, tmp_path, words)] == []


def is_missed(key: str, folder: Path, words: str) -> bool:
    """Whether a file without this key is refused in a sentence that names the key."""
    change(folder, **{key: None})
    try:
        imagereward(folder, words)
    except ConfigError as error:
        return re.search(rf"reward 'liked': .*an ImageReward: .*{key}.*", str(error)) is not None
    return False


def change(folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {**state(), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def test_an_unknown_key_is_named(tmp_path, words):
    change(tmp_path, **{f"blip.text_decoder.{i}": torch.zeros(1) for i in range(5)})
    with pytest.raises(ConfigError, match=r"keys are unknown: blip\.text_decoder\..* and 2 more"):
        imagereward(tmp_path, words)


def test_a_wrong_shape_is_named(tmp_path, words):
    change(tmp_path, **{"blip.visual_encoder.norm.bias": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"visual_encoder\.norm\.bias has shape \(3,\) where"):
        imagereward(tmp_path, words)


def test_keys_that_the_score_does_not_use_may_be_missing(tmp_path, reward, words):
    unused = [k for k in state() if "vision_proj" in k or "text_proj" in k or "position_ids" in k]
    assert len(unused) == 5
    change(tmp_path, **dict.fromkeys(unused))
    found = imagereward(tmp_path, words).score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, reward.score(IMAGES, PROMPTS))
    assert "mlp.layers.0.weight" in load_file(tmp_path / "model.safetensors")


def test_what_is_not_there_is_a_sentence(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor ImageReward\.pt"):
        imagereward(tmp_path)
    with pytest.raises(ConfigError, match=r"reward 'liked': .*options\.tokenizer '/nowhere'"):
        imagereward(folder)


def test_a_tokenizer_of_another_size_is_refused(tmp_path, folder):
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS[:-1])}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 15 words, but the weights are for 16"):
        imagereward(folder, str(tmp_path))


def test_a_pickle_with_code_is_refused(tmp_path, words):
    torch.save(BertTokenizer, tmp_path / "ImageReward.pt")
    with pytest.raises(ConfigError, match="reward 'liked'"):
        imagereward(tmp_path, words)
