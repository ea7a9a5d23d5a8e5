"""No model runs code of its own, and no checkpoint is unpickled."""

from __future__ import annotations

import builtins
import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, dynamic_module_utils

from b2ray.config import Model, Reward
from b2ray.config.paths import PACKAGE
from b2ray.diffusion.load import load_pipeline
from b2ray.errors import ConfigError
from b2ray.preflight import check_model
from b2ray.rewards import load
from tests.captioning import save_captioning
from tests.unit.rewards.test_hps import processor, theirs  # noqa: F401
from tests.unit.security.traps import edit, set_trap, write_bomb, write_module, write_plain_bomb

CPU = torch.device("cpu")


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """The file that is there if code has run, or if somebody was asked whether to run it."""
    mark = tmp_path / "mark"

    def ask(prompt: str = "") -> str:
        mark.touch()
        return "n"

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return mark


@pytest.fixture(scope="module")
def sources(tmp_path_factory, models, theirs, processor) -> Path:  # noqa: F811
    """Sound models of every kind of reward: clip, hps, aesthetic, imagereward, blip, bert."""
    place = tmp_path_factory.mktemp("sources")
    shutil.copytree(models / "reward", place / "clip")
    shutil.copytree(processor, place / "hps")
    torch.save(theirs.state_dict(), place / "hps" / "HPS_v2.1_compressed.pt")
    for name in ("aesthetic", "imagereward"):
        shutil.copytree(PACKAGE / "shapes" / "weights" / name, place / name)
    save_captioning(place)
    return place


def test_the_traps_work(models, tmp_path, mark):
    shutil.copytree(models / "reward", tmp_path / "reward")
    set_trap(tmp_path / "reward", mark, unknown=True)
    with pytest.raises(AttributeError):  # the class is none, but its module has run
        AutoConfig.from_pretrained(tmp_path / "reward", trust_remote_code=True)
    assert mark.exists()
    mark.unlink()
    write_bomb(tmp_path / "weights.pt", mark)
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert mark.exists()


# --- diffusion models ----------------------------------------------------------------------------


def own_pipeline(base: Path, mark: Path) -> None:
    write_module(base, mark, "pipeline")
    edit(base / "model_index.json", _class_name=["pipeline", "Trap"])


def own_component(base: Path, mark: Path) -> None:
    write_module(base / "unet", mark)
    edit(base / "model_index.json", unet=["trap", "Trap"])


def own_scheduler(base: Path, mark: Path) -> None:
    write_module(base / "scheduler", mark)
    edit(base / "model_index.json", scheduler=["trap", "Trap"])


def auto_tokenizer(base: Path, mark: Path) -> None:
    set_trap(base / "tokenizer", mark, unknown=True)
    edit(base / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])


def auto_text_encoder(base: Path, mark: Path) -> None:
    set_trap(base / "text_encoder", mark, unknown=True)
    edit(base / "model_index.json", text_encoder=["transformers", "AutoModel"])


def auto_unet(base: Path, mark: Path) -> None:
    write_module(base / "unet", mark)
    edit(base / "unet" / "config.json", auto_map={"AutoModel": "trap.Trap"}, _class_name="Trap")
    edit(base / "model_index.json", unet=["diffusers", "AutoModel"])


def module_of_the_path(base: Path, mark: Path) -> None:
    write_module(base, mark)
    edit(base / "model_index.json", unet=["trap", "Trap"])


def pickled_unet(base: Path, mark: Path) -> None:
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    write_bomb(base / "unet" / "diffusion_pytorch_model.bin", mark)


def pickled_text_encoder(base: Path, mark: Path) -> None:
    (base / "text_encoder" / "model.safetensors").unlink()
    write_bomb(base / "text_encoder" / "pytorch_model.bin", mark)


@pytest.mark.parametrize(
    "arm",
    [
        own_pipeline,
        own_component,
        own_scheduler,
        auto_tokenizer,
        auto_text_encoder,
        auto_unet,
        module_of_the_path,
        pickled_unet,
        pickled_text_encoder,
    ],
)
def test_a_pipeline_with_code_is_refused_in_a_sentence(models, tmp_path, mark, monkeypatch, arm):
    base = tmp_path / "base"
    shutil.copytree(models / "base", base)
    arm(base, mark)
    # Code beside the model may even be on Python's path: the working directory is.
    monkeypatch.chdir(base)
    monkeypatch.syspath_prepend(str(base))
    with pytest.raises(ConfigError, match=r"model\.path") as refused:
        check_model(str(base))
        load_pipeline(Model(path=str(base)))
    assert "\n" not in str(refused.value)
    assert "trust_remote_code" not in str(refused.value)
    assert not mark.exists()


def test_a_pipeline_with_code_that_is_not_needed_loads_without_it(models, tmp_path, mark):
    base = tmp_path / "base"
    shutil.copytree(models / "base", base)
    for part in ("text_encoder", "tokenizer", "unet", "vae"):
        set_trap(base / part, mark, unknown=False)
    load_pipeline(Model(path=str(base)))
    assert not mark.exists()


def test_a_pickle_called_safetensors_is_refused(tmp_path, mark):
    file = tmp_path / "model.safetensors"
    write_bomb(file, mark)
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_pipeline(Model(path=str(file)))
    checkpoint = tmp_path / "model.ckpt"
    write_bomb(checkpoint, mark)
    with pytest.raises(ConfigError, match=r"must be \.safetensors"):
        check_model(str(checkpoint))
    assert not mark.exists()


# --- rewards -------------------------------------------------------------------------------------

# The folders of a reward, and where each is named: its path, or an option.
FOLDERS = {
    "clip": {"path": "clip"},
    "pickscore": {"path": "clip", "processor": "clip"},
    "hps": {"path": "hps", "processor": "hps"},
    "aesthetic": {"path": "aesthetic"},
    "imagereward": {"path": "imagereward"},
    "bertscore": {"path": "blip", "text_model": "bert"},
}


def reward(kind: str, place: Path, sources: Path) -> Reward:
    """A reward with copies of its models in a folder."""
    named = {field: place / field for field in FOLDERS[kind]}
    for field, name in FOLDERS[kind].items():
        shutil.copytree(sources / name, named[field])
    options = {field: str(folder) for field, folder in named.items() if field != "path"}
    return Reward(name="r", kind=kind, path=str(named["path"]), options=options)


PLACES = [(kind, field) for kind, folders in FOLDERS.items() for field in folders]


@pytest.mark.parametrize(("kind", "field"), PLACES)
def test_a_reward_does_not_need_a_models_code(kind, field, sources, tmp_path, mark):
    spec = reward(kind, tmp_path, sources)
    set_trap(tmp_path / field, mark, unknown=False)
    load(spec, CPU)
    assert not mark.exists()


@pytest.mark.parametrize(("kind", "field"), PLACES)
def test_a_reward_never_runs_a_models_code(kind, field, sources, tmp_path, mark):
    spec = reward(kind, tmp_path, sources)
    set_trap(tmp_path / field, mark, unknown=True)
    with contextlib.suppress(ConfigError):  # what only a class of b2ray's own reads still loads
        load(spec, CPU)
    assert not mark.exists()


@pytest.mark.parametrize(("kind", "field"), [("clip", "path"), ("bertscore", "text_model")])
def test_code_is_refused_in_our_own_words(kind, field, sources, tmp_path, mark):
    spec = reward(kind, tmp_path, sources)
    set_trap(tmp_path / field, mark, unknown=True)
    with pytest.raises(ConfigError, match="needs code that comes with it") as refused:
        load(spec, CPU)
    assert "trust_remote_code" not in str(refused.value)


WEIGHTS = {
    ("imagereward", "path"): "ImageReward.pt",
    ("hps", "path"): "HPS_v2.1_compressed.pt",
    ("aesthetic", "head"): "head.pth",
    ("bertscore", "path"): "pytorch_model.bin",
    ("bertscore", "text_model"): "pytorch_model.bin",
    ("clip", "path"): "pytorch_model.bin",
}


@pytest.mark.parametrize("write", [write_bomb, write_plain_bomb], ids=["torch", "plain"])
@pytest.mark.parametrize(("kind", "field"), WEIGHTS)
def test_a_pickle_with_code_is_refused_in_a_sentence(kind, field, write, sources, tmp_path, mark):
    spec = reward(kind, tmp_path, sources)
    file = tmp_path / field / WEIGHTS[kind, field]
    if field == "head":
        file.parent.mkdir()
        spec = spec.model_copy(update={"options": {"head": str(file)}})
    (file.parent / "model.safetensors").unlink(missing_ok=True)
    write(file, mark)
    with pytest.raises(ConfigError, match="reward 'r'") as refused:
        load(spec, CPU)
    assert not mark.exists()
    sentence = str(refused.value)
    # CLIP models have to be safetensors anyway; torch's own words advise to open it all the same.
    assert "could run code" in sentence or "no file named model.safetensors" in sentence
    assert "weights_only" not in sentence and "\n" not in sentence
