"""What is kept of a run: commits, figures, evaluations, pictures, the summary, the LoRA."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from b2ray import trees
from b2ray.branching import RewardWindow
from b2ray.config import Config
from b2ray.cost import plan_cost
from b2ray.crew import Crew
from b2ray.demonstrations import too_small
from b2ray.diffusion import lora_file
from b2ray.discretion import masked
from b2ray.evaluation import Evaluated, overtaken
from b2ray.fleet.rollout import Rollout
from b2ray.fleet.roster import Event
from b2ray.prompts import PromptSets
from b2ray.tracking.folder import RunFolder, RunState, write_atomically
from b2ray.tracking.machines import Machines
from b2ray.tracking.mlflow_log import MlflowLog
from b2ray.tracking.mlflow_names import tracking_uri
from b2ray.tracking.show import Progress, cut, save_png, sheet, strip
from b2ray.usage import Reading

SEND_EVERY = 60.0  # seconds between looks of MLflow at a stage that goes on
DIVERSITY = ("pairwise", "vendi")


class Recorder:
    """Writes the run's folder, MLflow and the screen."""

    def __init__(
        self, config: Config, prompts: PromptSets, folder: RunFolder, log: MlflowLog
    ) -> None:
        self.config, self.prompts, self.folder, self.log = config, prompts, folder, log
        self.progress = Progress(config.curriculum.stages, 0)
        stages = config.advantage.window
        self.state = RunState(window=RewardWindow(stages), scores=RewardWindow(stages))
        self.advance: Callable[[int], Any] = lambda _: None
        self.machines = Machines(folder.system_file, config.tracking.system)
        self._since = time.perf_counter()
        self._committing = 0.0  # seconds that the last commit took: its own line precedes it
        self._sent = time.monotonic()

    # --- the life of a run ---------------------------------------------------------------------

    def resume(self, crew: Crew) -> RunState | None:
        """The last committed state, its weights bound everywhere; None for a new run."""
        found = self.folder.last_commit()
        if found is None:
            return None
        self.state = found.state
        self.line(f"resuming {self.folder.path} after stage {found.state.stage}")
        self.progress.close()
        self.progress = Progress(self.config.curriculum.stages, found.state.stage)
        with self.bar("loading models", 0):
            version, digest = found.state.version, found.state.digest
            crew.restored(
                version,
                digest,
                found.weights,
                found.optimizer,
                found.before,
                found.kept,
                found.prefixes,
            )
        self._tell_of_actors(crew)
        self._since = time.perf_counter()
        return self.state

    def begin(self, crew: Crew) -> RunState:
        """Version 0, evaluated and committed."""
        cost = plan_cost(self.config, prompts=self.prompts.train)
        self.line(
            f"this run: {cost.reward_queries:,} reward queries, at most {cost.unet_evals:,} UNet "
            f"evaluations, {cost.bytes_per_stage / 2**20:,.0f} MiB of objects a stage; "
            "`b2ray check` says more"
        )
        with self.bar("loading models", 0):
            crew.fresh()
        self._tell_of_actors(crew)
        self._since = time.perf_counter()
        return self._commit(crew, self.state, {})

    def commit(
        self,
        crew: Crew,
        state: RunState,
        figures: Mapping[str, float],
        costs: Mapping[str, float],
    ) -> RunState:
        """Make a stage final; evaluates first where the calendar says so.

        Args:
            state: the stages before it, with what this one has learnt of rewards and spreads.
        """
        counters = {k: state.counters.get(k, 0.0) + v for k, v in costs.items()}
        following = replace(state, stage=state.stage + 1, counters={**state.counters, **counters})
        done = self._commit(crew, following, figures)
        self.progress.stage_done()
        return done

    def keep_trees(
        self,
        stage: int,
        interval: int,
        rollout: Rollout,
        rewards: np.ndarray,
        advantage: np.ndarray,
        chosen: np.ndarray,
    ) -> None:
        """Keep small pictures of the first groups with what their leaves got; never fails.

        Args:
            stage: the stage that this makes.
            interval: n.
            rewards, advantage, chosen: of all leaves, each of shape (G, K).
        """
        groups = [group for unit in rollout.units for group in unit.groups]
        tables = {r.name: rollout.reward_table(r.name) for r in self.config.rewards}
        found = []
        for g in range(min(rollout.trees, len(groups))):
            leaves = tuple(
                trees.Leaf(
                    rollout.small[g, k],
                    float(rewards[g, k]),
                    {name: float(table[g, k]) for name, table in tables.items()},
                    float(advantage[g, k]),
                    bool(chosen[g, k]),
                )
                for k in range(rewards.shape[1])
            )
            fork = rollout.small[g, trees.FORK]
            found.append(trees.Tree(groups[g].prompt, interval, fork, leaves))
        if not found:
            return
        try:
            trees.save(self.folder.path, stage, found)
        except OSError as error:
            self.line(f"warning: the branch trees of stage {stage} cannot be kept: {error}")

    def keep_traces(self, traces: Mapping[str, bytes]) -> None:
        """Keep what the actors were traced doing, if they were; never fails."""
        try:
            for actor, content in traces.items():
                self.folder.save_trace(actor, content)
        except OSError as error:
            self.line(f"warning: the traces cannot be kept: {error}")

    def finish(self, crew: Crew) -> dict[str, Any]:
        """The LoRA as a file, the pictures side by side, and the summary, which ends the run."""
        file = lora_file.save(self.folder.lora, crew.newest[0], self.config.model.lora)
        files = {"LoRA": str(file)}
        for name, prompts in self.prompts.evaluated().items():
            picture = self._before_after(name, prompts)
            if picture:
                files[f"{name} set"] = picture
        files["figures"] = str(self.folder.metrics_file)
        files["MLflow"] = f"run {self.log.run_id} at {masked(tracking_uri(self.config))}"
        summary = self._summary(files)
        write_atomically(self.folder.summary_file, json.dumps(summary, indent=2) + "\n")
        return summary

    def close(self) -> None:
        """Leave the screen in order, and what machines did whole."""
        self.progress.close()
        self.machines.close()

    # --- the screen ----------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """A line that stays on the screen."""
        self.progress.line(text)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[None]:
        """A bar for one phase, moved by `advance`."""
        with self.progress.bar(what, total, "image") as move:
            self.advance = move
            yield
        self.advance = lambda _: None

    def _tell_of_actors(self, crew: Crew) -> None:
        for prompt in crew.too_long():
            self.line(f"the tokenizer cuts off the end of the prompt {prompt!r}")
        if self.prompts.demonstrations:
            small = too_small(self.prompts.demonstrations, crew.picture_size())
            if small:
                self.line(small)

    def fleet_event(self, event: Event) -> None:
        """Something happened to the fleet: fleet.jsonl, and a line if it is trouble."""
        self.folder.append_event(asdict(event))
        if event.line:
            self.line(event.line)

    def machine_readings(self, readings: Sequence[Reading]) -> None:
        """Keep how busy machines were, and show it before a long stage is done; never fails."""
        self.machines.add(readings)
        if self.state.digest and time.monotonic() - self._sent > SEND_EVERY:
            self._send()

    def _send(self) -> None:
        self.log.send()
        self._sent = time.monotonic()

    # --- stages --------------------------------------------------------------------------------

    def _commit(self, crew: Crew, state: RunState, figures: Mapping[str, float]) -> RunState:
        state.version, state.digest = crew.weights.version, crew.weights.digest
        began = time.perf_counter()
        images: list[str] = []
        evaluated: dict[str, float] = {}
        if self._is_due(state.stage):
            evaluated, images = self._evaluate(crew, state)
            figures = {**figures, **evaluated, "time/evaluate": time.perf_counter() - began}
        now = time.perf_counter()
        seconds = state.counters.get("seconds", 0.0) + now - self._since
        state.counters = {**state.counters, "seconds": seconds}
        self._since = now
        self._tell(state.stage, figures, evaluated)
        costs = {k: v for k, v in state.counters.items() if k != "seconds"}
        times = {"time/commit": self._committing, "time/total": seconds}
        self.folder.append_metrics(state.stage, {**figures, **costs, **times}, images)
        made = crew.prefixes.to_commit(state.stage - 1)
        self.folder.commit(state, *crew.newest, crew.kept, made)
        crew.prefixes.forget(state.stage)
        crew.gauges.stage(state.stage, figures)
        self._send()
        self.state = state
        self._committing = time.perf_counter() - now
        return state

    def _is_due(self, step: int) -> bool:
        last = self.config.curriculum.stages
        every = self.config.evaluation.every
        return step in (0, last) or (every > 0 and step % every == 0)

    def _tell(
        self, step: int, figures: Mapping[str, float], evaluated: Mapping[str, float]
    ) -> None:
        parts = [f"stage {step}/{self.config.curriculum.stages}"]
        if "interval" in figures:
            parts.append(f"interval {figures['interval']:.0f} of {self.config.sampling.steps}")
            if "reward/mean" in figures:
                parts.append(f"reward {figures['reward/mean']:.3f}")
            else:
                parts.append(f"{figures['demonstrations/kl']:.4f} nats from the demonstrations")
            parts.append(f"clipped {figures.get('policy/clip_fraction', 0):.0%}")
        shown = {k: v for k, v in evaluated.items() if k.startswith("eval/")}
        parts += [f"{k.removeprefix('eval/')} {v:.3f}" for k, v in shown.items()]
        self.line(" · ".join(parts))

    # --- evaluations ---------------------------------------------------------------------------

    def _evaluate(self, crew: Crew, state: RunState) -> tuple[dict[str, float], list[str]]:
        """Evaluate the current policy: figures, and the files of the preview pictures."""
        config = self.config.evaluation
        whole = state.stage in (0, self.config.curriculum.stages)
        count = max(config.final_images, config.images) if whole else config.images
        entry: dict[str, Any] = {"step": state.stage, "whole": whole, "sets": {}}
        figures: dict[str, float] = {}
        images: list[str] = []
        for which, (name, prompts) in enumerate(self.prompts.evaluated().items()):
            if not whole and name != "train":
                continue
            reference = state.reference if state.evaluations or which else None
            with self.bar(f"evaluating {count} pictures of the {name} set", count):
                found = crew.evaluate(prompts, which, count, reference, self.advance)
            state.reference = dict(found.reference)
            self.folder.save_scores(state.stage, name, found.prompts, found.scores)
            if name == "train":
                self._warn_of_hacking(state.stage, found.scores)
            entry["sets"][name] = found.means(count)
            # The same seeds at every evaluation, so that the series compares like with like.
            series = found.means(config.images)
            figures |= {f"eval/{name}/{k}": series[k] for k in found.scores}
            if name == "train":
                entry["series"] = series
                figures |= {f"heldout/{r.name}": series[r.name] for r in config.heldout_rewards}
                figures |= {f"diversity/{k}": series[k] for k in DIVERSITY if k in series}
            images += self._keep_pictures(name, prompts, state.stage, found)
        state.evaluations = [*state.evaluations, entry]
        return figures, images

    def _warn_of_hacking(self, step: int, scores: Mapping[str, np.ndarray]) -> None:
        """Say so when what is trained on rises and something held out falls."""
        heldout = [r.name for r in self.config.evaluation.heldout_rewards]
        before = self.folder.scores(0, "train")
        for name in overtaken(before, scores, heldout):
            n = min(len(before[name]), len(scores[name]))
            was, is_now = before[name][:n].mean(), scores[name][:n].mean()
            self.line(
                f"warning: the reward rises, but {name}, which is not trained on, falls on the "
                f"same seeds ({was:.3f} → {is_now:.3f}): look at "
                f"{self.folder.pictures / f'step-{step:05d}'}, and stop or lower learner.lr if the "
                "pictures get worse"
            )

    def _keep_pictures(
        self, name: str, prompts: tuple[str, ...], step: int, found: Evaluated
    ) -> list[str]:
        count = min(self.config.evaluation.previews, len(found.prompts))
        if count == 0:
            return []
        pictures = np.concatenate(found.pictures)[:count]
        folder = self.folder.pictures / f"step-{step:05d}"
        save_png(strip(pictures), self.folder.strip(step, name))
        texts = [prompts[i % len(prompts)] for i in range(count)]
        page = folder / f"preview_{name}.png"
        save_png(sheet(texts, [(f"stage {step}", pictures)]), page)
        return [str(page.relative_to(self.folder.path))]

    def _before_after(self, name: str, prompts: tuple[str, ...]) -> str | None:
        ends = self.state.evaluations[0], self.state.evaluations[-1]
        strips = [self.folder.strip(e["step"], name) for e in ends]
        if not all(s.exists() for s in strips):
            return None
        config = self.config.evaluation
        count = min(config.previews, max(config.final_images, config.images))
        texts = [prompts[i % len(prompts)] for i in range(count)]
        before, after = (cut(s, count) for s in strips)
        file = self.folder.pictures / f"before_after_{name}.png"
        save_png(sheet(texts, [("before", before), ("after", after)]), file)
        return str(file)

    def _summary(self, files: dict[str, str]) -> dict[str, Any]:
        first, last = self.state.evaluations[0]["sets"], self.state.evaluations[-1]["sets"]

        def pair(which: str, name: str) -> dict[str, float]:
            return {"before": first[which][name], "after": last[which][name]}

        rewards = (*self.config.rewards, *self.config.evaluation.heldout_rewards)
        counters = self.state.counters
        summary: dict[str, Any] = {
            "name": self.config.name,
            "seed": self.config.seed,
            "stages": self.state.stage,
            **({"reward": pair("train", "reward")} if self.config.rewards else {}),
            **{r.name: {which: pair(which, r.name) for which in first} for r in rewards},
            "diversity": {k: pair("train", k) for k in DIVERSITY if k in first["train"]},
            "reward_queries": int(counters.get("cost/reward_queries", 0)),
            "unet_evals": int(counters.get("cost/unet_evals", 0)),
            "seconds": round(counters["seconds"], 1),
            "evaluations": [{"step": e["step"], **e["series"]} for e in self.state.evaluations],
            "files": files,
        }
        return summary
