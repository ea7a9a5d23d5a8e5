"""How the released code runs a stage, written anew to compare with: nobody should run it so.

Each stage starts a process to sample, one to score and one to train. Each loads the whole pipeline
again; prefixes and branches go through the UNet eight at a time, one branch after the other; the
latents of all steps of all pictures are pickled, pictures are files; the learner takes two
trajectories at a time and one step after the other. Model, settings, densities and loss are
b2ray's own, and torch has all cores.

    python -m benchmarks.speed.released sample|score|train FOLDER
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from b2ray.config import Config
from b2ray.config.load import parse
from benchmarks.speed.ours import execute

SAMPLE_BATCH, SCORE_BATCH, TRAIN_BATCH = 8, 8, 2
PHASES = ("sample", "score", "train")


class Released:
    """A run in a folder, stage after stage.

    Args:
        words: of the command line.
        cores: threads of each process.
    """

    def __init__(self, words: Sequence[str], folder: Path, cores: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        settings = {"words": list(words), "threads": cores}
        (folder / "settings.json").write_text(json.dumps(settings))

    def stage(self) -> dict[str, float]:
        """One stage; the seconds of each process, from its start to its end."""
        found = {}
        for phase in PHASES:
            began = time.perf_counter()
            command = [sys.executable, "-m", "benchmarks.speed.released", phase, str(self.folder)]
            execute(command, f"the released schedule's {phase}", env=self._env())
            found[phase] = time.perf_counter() - began
        return found

    def size(self) -> int:
        """Bytes that a stage has left on the disk."""
        return sum(f.stat().st_size for f in self.folder.iterdir())

    def _env(self) -> dict[str, str]:
        threads = json.loads((self.folder / "settings.json").read_text())["threads"]
        return {"OMP_NUM_THREADS": str(threads)}


def main() -> None:
    """One process of a stage."""
    import torch

    phase, folder = sys.argv[1], Path(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    {"sample": sample, "score": score, "train": train}[phase](
        parse(settings["words"]).config, folder
    )


def _policy(config: Config, folder: Path) -> Any:
    import torch

    from b2ray.diffusion import lora_file
    from b2ray.diffusion.policy import Policy
    from b2ray.preflight import check_files

    policy = Policy(config, torch.device("cpu"))
    policy.prepare(check_files(config).trained())
    if (folder / lora_file.FILE).exists():
        policy.bind(lora_file.load(folder / lora_file.FILE))
    return policy


def sample(config: Config, folder: Path) -> None:
    """Prefixes of eight groups, then one branch of each after the other."""
    import torch
    from PIL import Image

    from b2ray.preflight import check_files

    policy, random = _policy(config, folder), np.random.default_rng()
    texts = check_files(config).trained()
    fork, steps = config.sampling.steps - config.interval_bounds[0], config.sampling.steps
    found: dict[str, list[Any]] = {k: [] for k in ("latents", "log_probs", "embeds", "prompts")}

    def noise(size: int) -> Any:
        return random.standard_normal((size, *policy.latent_shape), dtype=np.float32)

    for low in range(0, config.groups, SAMPLE_BATCH):
        size = min(SAMPLE_BATCH, config.groups - low)
        prompts = [texts[j] for j in random.integers(0, len(texts), size)]
        start = torch.from_numpy(noise(size))
        prefix = policy.denoise(start, prompts, 0, fork, lambda _, n=size: noise(n))
        for branch in range(config.branching.branches):
            x = prefix.latents[:, -1]
            made = policy.denoise(x, prompts, fork, steps, lambda _, n=size: noise(n))
            for row, picture in enumerate(policy.decode(made.latents[:, -1])):
                name = f"{low + row:05d}_{branch:02d}.png"
                Image.fromarray(picture).save(folder / name)
            found["latents"].append(torch.cat([prefix.latents[:, :-1], made.latents], 1))
            found["log_probs"].append(torch.cat([prefix.log_probs, made.log_probs], 1))
            found["embeds"].append(policy.encode(prompts)[0])
            found["prompts"] += [(low + row, branch, p) for row, p in enumerate(prompts)]
    tensors = {k: torch.cat(found[k]) for k in ("latents", "log_probs", "embeds")}
    x = tensors.pop("latents")
    whole = {**tensors, "latents": x[:, :-1].clone(), "next_latents": x[:, 1:].clone()}
    with (folder / "samples.pkl").open("wb") as file:
        pickle.dump({**whole, "prompts": found["prompts"]}, file)


def score(config: Config, folder: Path) -> None:
    """Every picture from its file."""
    import torch
    from PIL import Image

    from b2ray.rewards import Panel

    panel = Panel(config.rewards, torch.device("cpu"))
    with (folder / "samples.pkl").open("rb") as file:
        prompts = pickle.load(file)["prompts"]
    scores = []
    for low in range(0, len(prompts), SCORE_BATCH):
        some = prompts[low : low + SCORE_BATCH]
        files = [folder / f"{group:05d}_{branch:02d}.png" for group, branch, _ in some]
        pictures = np.stack([np.asarray(Image.open(file)) for file in files])
        found = panel.score(pictures, [p for _, _, p in some], [r.name for r in config.rewards])
        scores += np.sum([found[r.name] for r in config.rewards], axis=0).tolist()
    with (folder / "scores.pkl").open("wb") as file:
        pickle.dump(scores, file)


def train(config: Config, folder: Path) -> None:
    """The best and the worst leaf of each group, two at a time, step by step."""
    import torch

    from b2ray.diffusion import lora, lora_file
    from b2ray.objectives.densities import Densities
    from b2ray.objectives.ppo import ppo_clip

    policy = _policy(config, folder)
    with (folder / "samples.pkl").open("rb") as file:
        data = pickle.load(file)
    with (folder / "scores.pkl").open("rb") as file:
        scores = pickle.load(file)
    rows, advantage = chosen(data["prompts"], scores)
    parameters = lora.parameters(policy.pipeline.unet)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learner.lr)
    if (folder / "optimizer.pkl").exists():
        with (folder / "optimizer.pkl").open("rb") as file:
            optimizer.load_state_dict(pickle.load(file))
    steps = range(config.sampling.steps - config.interval_bounds[0], config.sampling.steps)
    batch = len(rows) if config.learner.batch == "all" else config.learner.batch
    elements = int(np.prod(policy.latent_shape))
    for _ in range(config.learner.inner_epochs):
        order = np.random.default_rng().permutation(len(rows))
        for done, low in enumerate(range(0, len(order), TRAIN_BATCH), 1):
            some = order[low : low + TRAIN_BATCH]
            mine = [rows[j] for j in some]
            texts = [data["prompts"][j][2] for j in mine]
            for step in steps:
                i = torch.full((len(mine),), step)
                x, next_latents = data["latents"][mine, step], data["next_latents"][mine, step]
                new = policy.log_prob(i, x, next_latents, texts)
                old = data["log_probs"][mine, step]
                weights = torch.tensor([advantage[j] for j in some])
                loss, _ = ppo_clip(Densities(new, old, weights), config.objective, elements)
                (loss.mean() / (len(steps) * max(1, batch // TRAIN_BATCH))).backward()
            if done % max(1, batch // TRAIN_BATCH) == 0 or low + TRAIN_BATCH >= len(order):
                torch.nn.utils.clip_grad_norm_(parameters.values(), config.learner.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    lora_file.save(folder, policy.lora_state(), config.model.lora)
    with (folder / "optimizer.pkl").open("wb") as file:
        pickle.dump(optimizer.state_dict(), file)


def chosen(
    prompts: Sequence[tuple[int, int, str]], scores: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Rows of the best and the worst leaf of each group, and how far they are from its mean."""
    groups: dict[int, list[int]] = {}
    for row, (group, _, _) in enumerate(prompts):
        groups.setdefault(group, []).append(row)
    rows: list[int] = []
    for members in groups.values():
        order = sorted(members, key=lambda j: scores[j])
        rows += [order[-1], order[0]]
    means = {j: float(np.mean([scores[m] for m in ms])) for ms in groups.values() for j in ms}
    spread = float(np.std(scores)) or 1.0
    return rows, [(scores[j] - means[j]) / spread for j in rows]


if __name__ == "__main__":
    main()
