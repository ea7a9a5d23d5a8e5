"""LoRA in and out: strict, float32, the same bytes, diffusers' format."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from b2ray.config import Lora
from b2ray.diffusion import lora, lora_file
from b2ray.errors import ConfigError
from tests.models import pipeline

SETTINGS = Lora(rank=2, alpha=3.0)


def fresh(settings: Lora = SETTINGS, dtype: torch.dtype = torch.float32, seed: int = 0):
    unet = pipeline().unet.to(dtype)
    lora.add(unet, settings, seed)
    return unet


@pytest.fixture(scope="module")
def unet():
    return fresh()


def random_values(unet, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=v.shape).astype(np.float32) for n, v in lora.state(unet).items()}


def output(unet, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=source), torch.randn(2, 5, 16, generator=source)
    with torch.no_grad():
        given = (x.to(dtype), torch.tensor([3, 700]))
        return unet(*given, encoder_hidden_states=text.to(dtype)).sample


def gradients(unet) -> dict[str, torch.Tensor]:
    """Of a loss on every output, by the adapter's parameters."""
    source = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=source), torch.randn(2, 5, 16, generator=source)
    x, text = x.double(), text.double()
    unet(x, torch.tensor([3, 700]), encoder_hidden_states=text).sample.square().sum().backward()
    return {name: p.grad for name, p in lora.parameters(unet).items()}


# --- the adapter -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_initial_adapter_changes_nothing(dtype):
    assert torch.equal(output(fresh(dtype=dtype), dtype), output(pipeline().unet.to(dtype), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_is_float32_over_a_smaller_base(dtype):
    unet = fresh(dtype=dtype)
    assert {p.dtype for p in lora.parameters(unet).values()} == {torch.float32}
    base = [p for n, p in unet.named_parameters() if ".lora_" not in n]
    assert {p.dtype for p in base} == {dtype}
    assert not any(p.requires_grad for p in base)
    assert all(p.requires_grad for p in lora.parameters(unet).values())
    values = random_values(unet)
    lora.bind(unet, values)
    found = lora.state(unet)
    assert all(np.array_equal(found[n], values[n]) for n in values)


def test_every_attention_projection_has_an_adapter_of_the_rank(unet):
    attention = [
        n
        for n, m in pipeline().unet.named_modules()
        if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    named = lora.parameters(unet)
    assert {n.rsplit(".lora_", 1)[0] for n in named} == set(attention)
    assert len(named) == 2 * len(attention)
    assert all(v.shape[0] == 2 for n, v in named.items() if ".lora_A." in n)


def test_the_first_adapter_depends_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = lora.digest(lora.state(fresh(seed=3)))
    torch.manual_seed(6)
    assert lora.digest(lora.state(fresh(seed=3))) == first
    assert lora.digest(lora.state(fresh(seed=4))) != first
    torch.manual_seed(5)
    unet = pipeline().unet
    torch.manual_seed(5)
    lora.add(unet, SETTINGS, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_target_that_matches_nothing_is_named():
    with pytest.raises(ConfigError, match=r"model\.lora\.targets names 'to_z'"):
        fresh(Lora(targets=("to_q", "to_z")))


# --- binding ---------------------------------------------------------------------------------


def test_what_is_bound_is_what_was_given(unet):
    values = random_values(unet)
    assert lora.bind(unet, values) == lora_file.digest(values)
    found = lora.state(unet)
    assert found.keys() == values.keys()
    assert all(np.array_equal(found[n], values[n]) for n in values)


def without_one(values):
    return dict(list(values.items())[1:])


def with_one_more(values):
    return {**values, "mid_block.nothing.lora_A.weight": np.zeros((2, 2), np.float32)}


def one_renamed(values):
    (name, value), *rest = values.items()
    return {name.replace("down", "dawn"): value, **dict(rest)}


def one_of_another_rank(values):
    (name, value), *rest = values.items()
    return {name: np.concatenate([value, value]), **dict(rest)}


def under_diffusers_prefix(values):
    return {f"unet.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_one, "1 of .* keys missing, 0 unknown"),
        (with_one_more, "0 of .* keys missing, 1 unknown .*mid_block.nothing"),
        (one_renamed, "1 of .* keys missing, 1 unknown"),
        (one_of_another_rank, "has shape .*rank and base model"),
        (under_diffusers_prefix, "keys missing"),
        (lambda _: {}, "keys missing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_bound(unet, change, words):
    before = lora_file.digest(lora.state(unet))
    with pytest.raises(ConfigError, match=words):
        lora.bind(unet, change(random_values(unet, seed=2)))
    assert lora_file.digest(lora.state(unet)) == before


# --- digest and file -------------------------------------------------------------------------


def test_any_byte_name_or_shape_changes_the_digest(unet):
    values = random_values(unet)
    name = next(iter(values))
    whole = lora_file.digest(values)
    raw = bytearray(values[name].tobytes())
    for at in (0, len(raw) // 2, len(raw) - 1):
        raw[at] ^= 1
        other = np.frombuffer(bytes(raw), np.float32).reshape(values[name].shape)
        assert lora_file.digest({**values, name: other}) != whole
        raw[at] ^= 1
    assert lora_file.digest({**values, name: values[name].reshape(-1)}) != whole
    assert lora_file.digest(one_renamed(values)) != whole
    assert lora_file.digest(dict(reversed(values.items()))) == whole


def test_a_file_reads_back_exactly(unet, tmp_path):
    values = random_values(unet)
    again = lora_file.load(lora_file.save(tmp_path, values, SETTINGS))
    assert lora_file.digest(again) == lora_file.digest(values)


def test_the_same_values_make_the_same_file_in_any_process(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from b2ray.config import Lora;"
        "from b2ray.diffusion.lora_file import save;"
        "names = [f'block{i}.lora_{s}.weight' for i in range(20) for s in 'AB'];"
        "values = {n: np.full((2, 3), i, np.float32) for i, n in enumerate(names)};"
        "save(Path(sys.argv[1]), values, Lora(rank=2, alpha=3.0))"
    )
    sums = set()
    for run in range(3):
        folder = tmp_path / str(run)
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
        sums.add(hashlib.sha256((folder / lora_file.FILE).read_bytes()).hexdigest())
    assert len(sums) == 1


@pytest.mark.parametrize("settings", [Lora(rank=2, alpha=2.0), Lora(rank=2, alpha=7.0)])
def test_the_file_loads_in_plain_diffusers_with_the_same_output(models, tmp_path, settings):
    ours = fresh(settings)
    values = random_values(ours)
    lora.bind(ours, values)
    lora_file.save(tmp_path, values, settings)
    plain = StableDiffusionPipeline.from_pretrained(models / "base", safety_checker=None)
    before = output(plain.unet)
    plain.load_lora_weights(tmp_path)
    assert not torch.allclose(output(plain.unet), before, atol=1e-3)
    torch.testing.assert_close(output(plain.unet), output(ours), rtol=1e-5, atol=1e-5)


# --- merged: one weight, base + adapter ------------------------------------------------------


@pytest.fixture
def merged():
    """The same adapter as sums of outputs and as sums of weights, with values of its own; in
    double precision, so that only a wrong formula makes a difference."""
    both = fresh().double(), fresh(SETTINGS.model_copy(update={"merged": True})).double()
    for unet in both:
        lora.bind(unet, random_values(unet))
    return both


def test_a_merged_adapter_computes_the_same(merged):
    apart, together = merged
    expected, found = output(apart, torch.float64), output(together, torch.float64)
    assert (expected - output(pipeline().unet.double(), torch.float64)).abs().max() > 0.01
    assert not torch.equal(expected, found), "it is not merged"
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_merged_adapter_learns_the_same(merged):
    expected, found = map(gradients, merged)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)


def test_a_merged_adapter_can_be_switched_off(merged):
    _, unet = merged
    base = output(pipeline().unet.double(), torch.float64)
    unet.disable_adapters()
    assert torch.equal(output(unet, torch.float64), base)
    unet.enable_adapters()
    assert not torch.equal(output(unet, torch.float64), base)
