"""LoRA files of other programs: what is bound is what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from b2ray.config import Lora
from b2ray.diffusion import lora, lora_export
from b2ray.diffusion.lora_file import FILE, digest, save
from b2ray.diffusion.lora_import import read_lora
from b2ray.errors import ConfigError
from tests.models import pipeline, random_lora, sdxl

OURS = Lora(rank=2, alpha=3.0)
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PLAIN = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"


@pytest.fixture(scope="module", params=[pipeline, sdxl], ids=["sd", "sdxl"])
def trained(request):
    """A LoRA for a small model."""
    unet = request.param().unet
    lora.add(unet, OURS, 0)
    return random_lora(lora.state(unet))


def bound(weights, adapter: Lora) -> str:
    """The digest of what a small model has bound."""
    unet = pipeline().unet
    lora.add(unet, adapter, 0)
    return lora.bind(unet, weights)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_an_export_comes_back_to_the_last_bit(trained, tmp_path, form):
    extra = ("title",) if form == "kohya" else ()
    content = getattr(lora_export, form)(trained, OURS, torch.float32, *extra)
    (tmp_path / "x.safetensors").write_bytes(content)
    weights, adapter = read_lora(tmp_path / "x.safetensors")
    assert (adapter.rank, adapter.alpha) == (2, 3.0)
    assert digest(weights) == digest(trained)


def test_a_folder_has_the_file(tmp_path):
    unet = pipeline().unet
    lora.add(unet, OURS, 0)
    weights = random_lora(lora.state(unet))
    save(tmp_path, weights, OURS)
    (tmp_path / "optimizer.safetensors").write_bytes(b"")
    found, adapter = read_lora(tmp_path)
    assert bound(found, adapter) == digest(weights)


def pair(rank: int, seed: int = 0, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, width), (width, rank)
    down, up = (torch.randn(s, generator=generator) for s in shapes)
    return down, up


def kohya(**alphas: float) -> dict[str, torch.Tensor]:
    """Two modules of ranks 2 and 4, in kohya's names."""
    tensors = {}
    for name, rank in ((QUERY, 2), (PLAIN, 4)):
        key = "lora_unet_" + name.replace(".", "_")
        down, up = pair(rank)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alphas:
            alpha = alphas["query"] if name == QUERY else alphas["plain"]
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def test_every_module_has_its_own_rank_and_scale(tmp_path):
    """W + alpha / rank · B·A, as kohya-ss/sd-scripts adds it."""
    alphas = {QUERY: 1.0, PLAIN: 3.0}
    safetensors.torch.save_file(kohya(query=1.0, plain=3.0), tmp_path / "x.safetensors")
    weights, adapter = read_lora(tmp_path / "x.safetensors")
    assert (adapter.rank, adapter.alpha, sorted(adapter.targets)) == (4, 4.0, [PLAIN, QUERY])
    base, mine, merged = (pipeline().unet for _ in range(3))
    lora.add(mine, adapter, 0)
    lora.bind(mine, weights)
    for name, rank in ((QUERY, 2), (PLAIN, 4)):
        down, up = pair(rank)
        merged.get_submodule(name).weight.data += alphas[name] / rank * up @ down
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, t = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)), torch.tensor(9)
    with torch.no_grad():
        found, wanted, plain = (
            unet(x, t, encoder_hidden_states=text).sample for unet in (mine, merged, base)
        )
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_without_an_alpha_the_scale_is_one(tmp_path):
    safetensors.torch.save_file(kohya(), tmp_path / "x.safetensors")
    weights, adapter = read_lora(tmp_path / "x.safetensors")
    assert adapter.alpha == adapter.rank == 4
    assert np.array_equal(weights[f"{QUERY}.lora_B.weight"][:, :2], pair(2)[1].numpy())
    assert not weights[f"{QUERY}.lora_B.weight"][:, 2:].any()


def peft(**settings: object) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    down, up = pair(2)
    notes = {f"unet.{k}": v for k, v in settings.items()}
    tensors = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    return tensors, {"lora_adapter_metadata": json.dumps(notes)}


def test_diffusers_settings_count(tmp_path):
    tensors, notes = peft(r=2, lora_alpha=8, alpha_pattern={"attn1.to_q": 5})
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", notes)
    assert read_lora(tmp_path / "x.safetensors")[1].alpha == 5.0


@pytest.mark.parametrize(
    ("tensors", "notes", "sentence"),
    [
        ({"a.weight": torch.ones(2)}, {}, "is no LoRA that b2ray knows"),
        (peft()[0] | {"text_encoder.x.lora_A.weight": torch.ones(2)}, {}, "the text encoder, too"),
        (peft()[0] | {f"unet.{QUERY}.dora_scale": torch.ones(2)}, {}, "is no plain LoRA"),
        (peft()[0], peft(use_rslora=True)[1], "it has use_rslora"),
        (dict([next(iter(peft()[0].items()))]), {}, "only one of the two matrices"),
        (peft()[0], {"lora_adapter_metadata": "["}, "no JSON object"),
    ],
)
def test_what_would_not_be_the_lora_is_refused(tmp_path, tensors, notes, sentence):
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", notes)
    with pytest.raises(ConfigError, match=sentence):
        read_lora(tmp_path / "x.safetensors")


def test_files_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no LoRA"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=r"has no \.safetensors file"):
        read_lora(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickled weights run code"):
        read_lora(tmp_path / "x.pt")
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"has 2 \.safetensors files"):
        read_lora(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        read_lora(tmp_path / "a.safetensors")
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(ConfigError, match=f"{FILE} cannot be read"):
        read_lora(tmp_path)
