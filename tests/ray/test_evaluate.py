"""`b2ray evaluate` on real actors: a run's own figures again, and comparisons on the same seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from b2ray.commands import export
from b2ray.commands.evaluate import main
from b2ray.errors import EXIT_CONFIG, EXIT_DONE, EXIT_WORKER
from tests.models import PROMPTS
from tests.runner import Runner


@pytest.fixture
def evaluate(runner: Runner, capsys: pytest.CaptureFixture[str]):
    """The exit code and the document of a call."""

    def call(*words: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()  # what a run has said
        code = runner.call(main, [*map(str, words), f"--runs={runner.runs}", "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def refuse_other_figures(folder: Path, document: dict[str, Any], name: str) -> None:
    """Every figure of a run's summary stands in the document, to the last bit."""
    summary = json.loads((folder / "summary.json").read_text())
    for policy, when in (("base model", "before"), (name, "after")):
        for which, entry in document["sets"].items():
            found = {k: v["mean"] for k, v in entry["figures"][policy].items()}
            assert found["clip"] == summary["clip"][which][when]
            if which == "train":
                assert found["reward"] == summary["reward"][when]
                assert found["vendi"] == summary["diversity"]["vendi"][when]
                assert found["pairwise"] == summary["diversity"]["pairwise"][when]
    kept = json.loads((folder / "evaluations" / "step-00003_train.json").read_text())
    scores = json.loads(Path(document["files"]["scores train"]).read_text())
    assert scores["prompts"] == kept["prompts"]
    assert scores["scores"][name] == kept["scores"]


def test_a_finished_run_has_the_figures_of_its_summary(
    runner: Runner, undisturbed: str, evaluate
) -> None:
    code, document = evaluate(undisturbed)
    folder = runner.runs / undisturbed
    assert code == EXIT_DONE
    refuse_other_figures(folder, document, undisturbed)
    assert [p["name"] for p in document["policies"]] == ["base model", undisturbed]
    train, heldout = document["sets"]["train"], document["sets"]["heldout"]
    assert (train["unit"], heldout["unit"], heldout["prompts"]) == ("picture", "prompt", 3)
    apart = train["differences"]["clip"]
    means = [train["figures"][p]["clip"]["mean"] for p in ("base model", undisturbed)]
    assert apart["mean"]["mean"] == pytest.approx(means[1] - means[0])
    assert apart["mean"]["low"] < apart["mean"]["mean"] < apart["mean"]["high"]
    assert 0 <= apart["mean"]["p"] <= 1 and apart["higher"] + apart["lower"] <= 1
    files = {Path(file) for file in document["files"].values()}
    assert set((folder / "evaluate" / "001").iterdir()) == files
    assert "clip" in (folder / "evaluate" / "001" / "table.txt").read_text()
    assert json.loads((folder / "evaluate" / "001" / "evaluation.json").read_text()) == document


def test_so_has_one_whose_rewards_are_standardised_with_another_fleet(
    runner: Runner, evaluate
) -> None:
    rewards = [
        {"name": "clip", "kind": "clip", "path": str(runner.models / "reward"), "scale": "window"},
        {"name": "jpeg", "kind": "jpeg_compressibility", "scale": "window", "weight": 0.5},
    ]
    assert runner.here("windowed", rewards=json.dumps(rewards)) == EXIT_DONE
    code, document = evaluate("windowed", "--fleet.samplers.max=1")
    assert code == EXIT_DONE
    refuse_other_figures(runner.runs / "windowed", document, "windowed")


def test_an_export_is_the_run(runner: Runner, undisturbed: str, evaluate, tmp_path) -> None:
    """Paired with what it was exported from it differs nowhere, and nothing is claimed."""
    file = tmp_path / "kohya.safetensors"
    words = [undisturbed, f"--runs={runner.runs}", "--format=kohya", f"--output={file}"]
    assert export.main(words) == EXIT_DONE
    code, document = evaluate(undisturbed, "--lora", file, "--output", tmp_path / "out")
    assert code == EXIT_DONE
    assert [p["name"] for p in document["policies"]] == [undisturbed, "kohya"]
    assert len({p["digest"] for p in document["policies"]}) == 1
    for entry in document["sets"].values():
        for found in entry["differences"].values():
            assert found["mean"]["mean"] == found["higher"] == found["lower"] == 0
            assert found["mean"]["p"] is None
    assert (tmp_path / "out" / "sheet_heldout.png").is_file()


def test_a_stage_beside_the_end_of_the_run_in_another_setting(
    runner: Runner, undisturbed: str, evaluate, tmp_path
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(PROMPTS[:2]))
    rewards = '[{"name": "size", "kind": "jpeg_compressibility"}]'
    setting = ("--rewards", rewards, "--prompts", file, "--images=10", "--seed=5", "--steps=3")
    code, document = evaluate(undisturbed, undisturbed, "--stage=2", *setting)
    assert code == EXIT_DONE
    early = f"{undisturbed}, stage 2 of 3"
    assert [p["name"] for p in document["policies"]] == [early, undisturbed]
    entry = document["sets"]["mine"]
    assert (entry["pictures"], entry["prompts"], entry["unit"]) == (10, 2, "prompt")
    # A reward without embeddings says nothing of diversity, and none is trained on here.
    assert list(entry["figures"][early]) == list(entry["differences"]) == ["size"]
    assert entry["differences"]["size"]["mean"]["mean"] != 0
    assert document["settings"]["seed"] == 5 and document["settings"]["sampling"]["steps"] == 3
    assert any("sampling settings (steps: 4, here 3)" in note for note in document["notes"])


def test_a_base_model_alone(runner: Runner, undisturbed: str, evaluate) -> None:
    config = runner.runs / undisturbed / "config.yaml"
    code, document = evaluate("--config", config, "--images=4", "--evaluation.previews=0")
    assert code == EXIT_DONE
    assert [(p["name"], p["digest"]) for p in document["policies"]] == [("base model", None)]
    assert "differences" not in document["sets"]["train"]
    assert Path(document["files"]["table"]).parent == runner.runs / "evaluate" / "001"
    assert not any(name.startswith("sheet") for name in document["files"])


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "wrong: the LoRA's mid_block"),
        ("mid_block.attentions.9.transformer_blocks.0.attn1.to_q", "wrong: model.lora.targets"),
    ],
)
def test_a_lora_of_another_model_is_a_sentence(
    runner: Runner, undisturbed: str, evaluate, tmp_path, module, said
) -> None:
    shapes = {"lora_A": (2, 9), "lora_B": (9, 2)}
    wrong = {f"unet.{module}.{which}.weight": torch.ones(shape) for which, shape in shapes.items()}
    safetensors.torch.save_file(wrong, tmp_path / "wrong.safetensors")
    code, document = evaluate(undisturbed, "--lora", tmp_path / "wrong.safetensors")
    assert code == EXIT_CONFIG
    assert document["error"].startswith(said)
    folder = runner.runs / undisturbed / "evaluate"
    assert all(any(made.iterdir()) for made in folder.glob("*"))  # no empty folder is left


def test_a_reward_that_breaks_is_named(runner: Runner, undisturbed: str, evaluate) -> None:
    rewards = '[{"name": "bad", "kind": "tests.ray.rewards:NotANumber"}]'
    code, document = evaluate(undisturbed, "--rewards", rewards)
    assert code == EXIT_WORKER
    assert "'bad' returned nan" in document["error"]
