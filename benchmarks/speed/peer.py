"""A peer from a package: trl's DDPOTrainer, in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from b2ray.config import Config
from b2ray.config.paths import find
from b2ray.preflight import check_files
from benchmarks.speed.ours import execute

# torch is asked for exactly and first, so that no other build comes with what asks for "a torch".
TORCH = "torch==2.13.0"
PACKAGES = (
    *("trl==0.11.4", "transformers==4.46.3", "diffusers==0.31.0", "accelerate==1.1.1"),
    *("peft==0.13.2", "huggingface_hub<0.27", "rich", "pillow"),
)
SCRIPT = Path(__file__).with_name("peer_trl.py")


@dataclass(frozen=True)
class Peer:
    """An environment with trl in it."""

    python: Path

    def epochs(self, settings: dict[str, Any]) -> list[dict[str, float]]:
        """Run its trainer; what each epoch took: `seconds`, and of them `sampling`."""
        env = {"OMP_NUM_THREADS": str(settings["threads"]), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        command = [str(self.python), str(SCRIPT), json.dumps(settings)]
        printed = execute(command, "trl's DDPOTrainer", env=env)
        found: list[dict[str, float]] = json.loads(printed.splitlines()[-1])
        return found


def install(folder: Path) -> Peer | None:
    """Make the environment, unless it is there; None, and a message, if it cannot be made."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = "\n".join([TORCH, *PACKAGES])
    if ready.exists() and ready.read_text() == wanted:
        return Peer(python.absolute())
    print(f"installing trl into {folder} …", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", TORCH]
    steps = [[sys.executable, "-m", "venv", str(folder)], pip, [*pip, *PACKAGES]]
    for command in steps:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = ((done.stderr or done.stdout).strip().splitlines() or ["no reason given"])[-1]
            print(f"trl is left out: it cannot be installed ({reason})", file=sys.stderr)
            return None
    ready.write_text(wanted)
    return Peer(python.absolute())


def as_it_was(model: Path, copy: Path) -> Path:
    """A copy of a model with its tokenizers in the form that the peer's transformers reads."""
    shutil.copytree(model, copy, dirs_exist_ok=True)
    for file in copy.rglob("tokenizer.json"):
        table = json.loads(file.read_text(encoding="utf-8"))["model"]
        pairs = (" ".join(m) if isinstance(m, list) else m for m in table["merges"])
        merges = "\n".join(["#version: 0.2", *pairs])
        file.with_name("merges.txt").write_text(f"{merges}\n", encoding="utf-8")
        file.with_name("vocab.json").write_text(json.dumps(table["vocab"]), encoding="utf-8")
    return copy


def settings(config: Config, folder: Path, threads: int, epochs: int) -> dict[str, Any]:
    """A DDPO run's configuration in the peer's words.

    Args:
        folder: where copies of the models go.
        threads: of the peer's one process.
        epochs: stages.
    """
    (reward,) = config.rewards
    batch = config.learner.batch
    base, scorer = find(config.model.path), find(reward.path or "")
    assert base is not None and scorer is not None and batch != "all"
    levels = json.loads((scorer / "processor_config.json").read_text())["image_processor"]
    return {
        "model": str(as_it_was(base, folder / "base")),
        "reward": str(as_it_was(scorer, folder / "reward")),
        "mean": levels["image_mean"],
        "std": levels["image_std"],
        "prompts": list(check_files(config).trained()),
        "images": config.branching.images,
        "steps": config.sampling.steps,
        "guidance": config.sampling.guidance,
        "batch": batch,
        "sample_batch": config.branching.branch_batch,
        "inner_epochs": config.learner.inner_epochs,
        "lr": config.learner.lr,
        "clip": config.objective.clip_nats / 256,
        "threads": threads,
        "epochs": epochs,
        "seed": config.seed,
    }
