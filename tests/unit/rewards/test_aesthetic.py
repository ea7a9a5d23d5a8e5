"""The aesthetic predictor: its file, its head in one affine map, and its score."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection

from b2ray.config import Reward
from b2ray.errors import ConfigError
from b2ray.rewards import Panel, head, load
from tests.models import PROMPTS, clip

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def five_layers(width: int, seed: int = 0) -> torch.nn.Sequential:
    """Written out as the released predictor has them, and large enough to tell pictures apart."""
    torch.manual_seed(seed)
    linear, drop = torch.nn.Linear, torch.nn.Dropout
    layers = torch.nn.Sequential(
        linear(width, 64), drop(0.2), linear(64, 32), drop(0.2), linear(32, 24), drop(0.1),
        linear(24, 16), linear(16, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for layer in layers[:7:2]:
            layer.weight *= 3
        layers[7].bias += 5
    return layers


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    model = clip()[0]
    tower = CLIPVisionModelWithProjection(model.config.vision_config)
    tower.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in tower.state_dict()}, strict=True
    )
    return tower.eval()


@pytest.fixture(scope="module")
def layers() -> torch.nn.Sequential:
    return five_layers(16)


def head_tensors(layers: torch.nn.Sequential) -> dict[str, torch.Tensor]:
    return {f"layers.{k}": v for k, v in layers.state_dict().items()}


def save(folder, tower, layers=None, **more: torch.Tensor) -> str:
    """A folder with one file for tower and head, as the released one."""
    tower.config.save_pretrained(folder)
    tensors = {**tower.state_dict(), **(head_tensors(layers) if layers else {}), **more}
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tower, layers) -> str:
    buffer = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}  # older files
    return save(tmp_path_factory.mktemp("aesthetic"), tower, layers, **buffer)


def aesthetic(path: str, **options: str):
    return load(Reward(name="looks", kind="aesthetic", path=path, options=options), CPU)


def plain(tower, layers, images: np.ndarray) -> np.ndarray:
    """Through Pillow, the model's own forward and the five layers."""
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    inputs = processor([Image.fromarray(i) for i in images], return_tensors="pt")
    with torch.no_grad():
        embeds = tower(**inputs).image_embeds
        return layers(embeds / embeds.norm(dim=-1, keepdim=True))[:, 0].numpy()


def test_the_score_is_the_plain_computation(folder, tower, layers):
    found = aesthetic(folder).score(IMAGES, PROMPTS)
    assert (found.dtype, found.shape) == (np.float32, (3,))
    wanted = plain(tower, layers, IMAGES)
    assert wanted.std() > 0.01
    np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_another_size_is_resized_as_by_pillow(folder, tower, layers):
    images = RNG.integers(0, 256, (3, 40, 64, 3), dtype=np.uint8)
    found = aesthetic(folder).score(images, PROMPTS)
    np.testing.assert_allclose(found, plain(tower, layers, images), atol=1e-2)


def test_the_folded_head_is_the_five_layers():
    layers = five_layers(768)
    units = torch.nn.functional.normalize(torch.randn(4096, 768), dim=1)
    with torch.no_grad():
        folded = head.fold(layers)(units.double()).float()
        assert float((folded - layers(units)).abs().max()) < 1e-6


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "tower"])
def test_a_head_may_have_its_own_file(tmp_path, folder, tower, layers, suffix, whole):
    file = tmp_path / f"head.{suffix}"
    tensors = head_tensors(layers)
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    (clip()[0] if whole else tower).save_pretrained(tmp_path / "clip")
    found = aesthetic(str(tmp_path / "clip"), head=str(file)).score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(found, aesthetic(folder).score(IMAGES, PROMPTS))


def test_half_precision_files_are_computed_in_float32(tmp_path, tower, layers):
    path = save(tmp_path, tower, layers)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v.half() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    reward = aesthetic(path)
    assert reward.model.dtype == torch.float32
    np.testing.assert_allclose(
        reward.score(IMAGES, PROMPTS), plain(tower, layers, IMAGES), atol=1e-2
    )


def test_the_folders_own_processor_counts(tmp_path, tower, layers):
    path = save(tmp_path, tower, layers)
    before = aesthetic(path)
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(path)
    after = aesthetic(path)
    assert (before.mean[0], after.mean[0]) == (0.48145466, 0.5)
    assert np.abs(before.score(IMAGES, PROMPTS) - after.score(IMAGES, PROMPTS)).max() > 1e-2


def test_scores_are_the_same_again_and_alone(folder):
    reward = aesthetic(folder)
    together = reward.score(IMAGES, PROMPTS)
    np.testing.assert_array_equal(together, reward.score(IMAGES, PROMPTS))
    alone = [reward.score(IMAGES[i : i + 1], PROMPTS[:1])[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=5e-6)


def test_it_embeds_as_clip_does(folder, models):
    spec = Reward(name="looks", kind="aesthetic", path=folder)
    vectors = Panel([spec], CPU).embed(IMAGES)
    theirs = load(Reward(name="clip", kind="clip", path=str(models / "reward")), CPU).embed(IMAGES)
    np.testing.assert_allclose(vectors, theirs, atol=1e-6)


# --- what does not load ----------------------------------------------------------------------


def broken(folder, name: str) -> str:
    """Change the file of a good folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    match name:
        case "no head":
            tensors = {k: v for k, v in tensors.items() if not k.startswith("layers.")}
        case "missing":
            del tensors["vision_model.post_layernorm.bias"]
        case "missing in the head":
            del tensors["layers.4.bias"]
        case "unknown":
            tensors["vision_model.extra"] = torch.zeros(1)
        case "unknown in the head":
            tensors["layers.9.weight"] = torch.zeros(1)
        case "another head":  # ReLU between, so other places
            tensors["layers.3.weight"] = tensors.pop("layers.2.weight")
        case "narrow":
            tensors["layers.0.weight"] = tensors["layers.0.weight"][:, :8].contiguous()
        case "shape":
            tensors["vision_model.post_layernorm.bias"] = torch.zeros(3)
    save_file(tensors, file)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no head", "it has no head .options.head names one"),
        ("missing", "keys are missing: vision_model.post_layernorm.bias"),
        ("missing in the head", "keys are missing: layers.4.bias"),
        ("unknown", "keys are unknown: vision_model.extra"),
        ("unknown in the head", "keys are unknown: layers.9.weight"),
        ("another head", "layers.2.weight is missing"),
        ("narrow", "maps 8 numbers to 1, but the tower's vectors have 16"),
        ("shape", r"vision_model.post_layernorm.bias has shape \(3,\) where \(16,\) fits"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, tower, layers, name, words):
    save(tmp_path, tower, layers)
    with pytest.raises(ConfigError, match=f"reward 'looks': .*an aesthetic predictor.*{words}"):
        aesthetic(broken(tmp_path, name))


def test_a_file_that_is_not_there_is_a_sentence(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"reward 'looks': .*model\.safetensors is not there"):
        aesthetic(str(tmp_path))
    with pytest.raises(ConfigError, match=r"options\.head 'none\.pth' is not a file"):
        aesthetic(folder, head="none.pth")


def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path, models):
    torch.save({"layers": json.dumps({})}, tmp_path / "head.pth")
    with pytest.raises(ConfigError, match=r"head\.pth is not a mapping of names to tensors"):
        aesthetic(str(models / "reward"), head=str(tmp_path / "head.pth"))
    torch.save(CLIPModel, tmp_path / "code.pth")
    with pytest.raises(ConfigError, match="reward 'looks'"):
        aesthetic(str(models / "reward"), head=str(tmp_path / "code.pth"))
