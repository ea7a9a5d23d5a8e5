"""`b2ray export`: whole files in the right places, or one sentence and nothing."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from b2ray.commands.export import main
from b2ray.diffusion import lora
from b2ray.diffusion.lora_file import FILE
from b2ray.errors import EXIT_CONFIG, EXIT_DONE
from tests.models import PROMPTS


@pytest.fixture
def export(runs):
    return lambda run, form, *more: main([run, f"--runs={runs}", f"--format={form}", *more])


def pictures(pipe: StableDiffusionPipeline) -> np.ndarray:
    """Two pictures, float32 in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(
        PROMPTS[:2], num_inference_steps=4, latents=x.to(pipe.dtype), output_type="np"
    ).images


@pytest.fixture(scope="module")
def drawn(models: Path, weights) -> np.ndarray:
    """What the small model draws with the LoRA bound as in training."""
    from b2ray.config import Lora

    pipe = StableDiffusionPipeline.from_pretrained(models / "base")
    lora.add(pipe.unet, Lora(rank=2, alpha=3.0), 0)
    lora.bind(pipe.unet, weights)
    return pictures(pipe)


@contextmanager
def small_disk(size: int):
    """Files cannot grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lora_files_go_into_the_runs_folder_and_load(export, runs, models, drawn, capsys):
    assert export("done", "diffusers") == export("done", "kohya") == EXIT_DONE
    shown = capsys.readouterr().out
    for file in (
        runs / "done/export/diffusers" / FILE,
        runs / "done/export/kohya/done.safetensors",
    ):
        assert f"done, stage 3 of 3, float32: {file}\n" in shown
        pipe = StableDiffusionPipeline.from_pretrained(models / "base")
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        assert np.abs(pictures(pipe) - drawn).max() < 1e-4
        assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_merged_pipeline_needs_no_adapter(export, drawn, tmp_path):
    output = tmp_path / "deep" / "model"
    assert export("done", "merged", f"--output={output}") == EXIT_DONE
    pipe = StableDiffusionPipeline.from_pretrained(output, use_safetensors=True)
    assert not any("lora" in name for name, _ in pipe.unet.named_modules())
    assert np.abs(pictures(pipe) - drawn).max() < 1e-4
    assert not list(tmp_path.rglob("*.part"))


def test_a_merged_pipeline_has_the_precision_asked_for(export, drawn, tmp_path):
    output = tmp_path / "model"
    assert export("going", "merged", f"--output={output}", "--dtype=bfloat16") == EXIT_DONE
    for part in ("unet", "vae", "text_encoder"):
        with safe_open(next((output / part).glob("*.safetensors")), "pt") as file:
            assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    pipe = StableDiffusionPipeline.from_pretrained(output, dtype=torch.bfloat16)
    assert np.abs(pictures(pipe) - drawn).max() < 0.05


def test_every_format_says_how_it_is_used(export, tmp_path, capsys):
    merged, file = str(tmp_path / "model"), str(tmp_path / "x.safetensors")
    assert export("done", "merged", f"--output={merged}", "--dtype=float16") == EXIT_DONE
    shown = capsys.readouterr().out
    assert f"DiffusionPipeline.from_pretrained({merged!r}, dtype=torch.float16)\n" in shown
    assert export("done", "diffusers", f"--output={file}") == EXIT_DONE
    assert f"pipeline.load_lora_weights({file!r})\n" in capsys.readouterr().out


def test_an_unfinished_run_says_which_stage_it_is(export, tmp_path, capsys):
    assert export("going", "kohya", f"--output={tmp_path}", "--dtype=float16") == EXIT_DONE
    file = tmp_path / "going.safetensors"
    assert f"going, stage 2 of 3, float16: {file}\n" in capsys.readouterr().out
    assert export("going", "kohya", "--stage=1", f"--output={tmp_path / 'a.safetensors'}") == 0
    assert "stage 1 of 3" in capsys.readouterr().out
    assert (tmp_path / "a.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("gone", "kohya"), "there is no run 'gone'"),
        (("begun", "kohya"), "has no committed stage yet"),
        (("done", "onnx"), "--format is 'onnx': the formats are diffusers, kohya, merged"),
        (("done", "kohya", "--dtype=int8"), "argument --dtype: invalid choice: 'int8'"),
        (("done", "kohya", "--stage=x"), "argument --stage: invalid int value: 'x'"),
        (("done", "kohya", "--stage=1"), "has no stage 1"),
    ],
)
def test_wrong_input_is_one_sentence(export, capsys, words, sentence):
    assert export(*words) == EXIT_CONFIG
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize("form", ["kohya", "merged"])
def test_what_is_there_is_replaced_only_by_force(export, tmp_path, capsys, form):
    output = tmp_path / ("x.safetensors" if form == "kohya" else "x")
    assert export("done", form, f"--output={output}") == EXIT_DONE
    mark = output if form == "kohya" else output / "model_index.json"
    mark.write_text("{}")
    assert export("done", form, f"--output={output}") == EXIT_CONFIG
    assert f"{output} exists: give another --output, or --force" in capsys.readouterr().err
    assert mark.read_text() == "{}"
    assert export("done", form, f"--output={output}", "--force") == EXIT_DONE
    assert mark.stat().st_size > 2


def test_force_deletes_no_folder_that_is_no_pipeline(export, tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    words = ("done", "merged", f"--output={tmp_path / 'letters'}", "--force")
    assert export(*words) == EXIT_CONFIG
    assert "is a folder but no pipeline, --force does not delete it" in capsys.readouterr().err
    assert (tmp_path / "letters").is_dir()


@pytest.mark.parametrize("form", ["diffusers", "kohya", "merged"])
def test_a_full_disk_is_a_sentence_and_leaves_what_was_there(export, tmp_path, capsys, form):
    output = tmp_path / ("x" if form == "merged" else "x.safetensors")
    assert export("done", form, f"--output={output}") == EXIT_DONE
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with small_disk(4096):
        code = export("done", form, f"--output={output}", "--force")
    assert code == EXIT_CONFIG
    assert f"{output} cannot be written: " in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_is_a_sentence(export, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert export("done", "kohya", f"--output={tmp_path / 'file' / 'x.safetensors'}") == EXIT_CONFIG
    assert "x.safetensors cannot be written: [Errno" in capsys.readouterr().err


def test_a_base_model_that_is_gone_is_a_sentence(runs, tmp_path, capsys):
    settings = (runs / "done" / "config.yaml").read_text()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("lora", "summary.json"):
        (moved / name).symlink_to(runs / "done" / name)
    lines = ["  path: /no/such/model" if "/base" in s else s for s in settings.splitlines()]
    (moved / "config.yaml").write_text("\n".join(lines))
    assert main([str(moved), "--format=merged"]) == EXIT_CONFIG
    shown = capsys.readouterr().err
    assert "model.path '/no/such/model' cannot be loaded as a Stable Diffusion pipeline" in shown
    assert main([str(moved), "--format=kohya"]) == EXIT_DONE  # needs no base model


def test_for_programs_there_is_a_document(export, tmp_path, capsys):
    words = ("--stage=1", f"--output={tmp_path / 'x.safetensors'}", "--json")
    assert export("going", "kohya", *words) == EXIT_DONE
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["run"], found["stage"], found["format"]) == ("going", 1, "kohya")
    assert Path(found["output"]).is_file()
    assert "going, stage 1 of 3" in shown.err  # words for people stay, elsewhere


def test_for_programs_a_refusal_is_a_document_too(export, capsys):
    assert export("gone", "kohya", "--json") == EXIT_CONFIG
    shown = capsys.readouterr()
    assert "there is no run 'gone'" in json.loads(shown.out)["error"]
    assert "there is no run 'gone'" in shown.err
    assert main(["--json", "--nonsense"]) == EXIT_CONFIG
    assert "RUN" in json.loads(capsys.readouterr().out)["error"]
