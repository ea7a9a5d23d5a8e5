"""Records a run: its commits, metrics, evaluations, pictures, summary, and final LoRA."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from b2ray.actors.system_metrics import Reading
from b2ray.algorithm.replay import ReplayEntry
from b2ray.config import DIVERSITY, Config
from b2ray.config.secrets import masked
from b2ray.diffusion import lora_file
from b2ray.diffusion.lora_file import State
from b2ray.evaluation.evaluate import Evaluation, overtaken
from b2ray.fleet.roster import Event
from b2ray.prompts import PromptSets
from b2ray.tracking import branch_trees
from b2ray.tracking.branch_trees import Tree
from b2ray.tracking.folder import Checkpoint, RunFolder, RunState, write_atomically
from b2ray.tracking.mlflow.log import MlflowLog
from b2ray.tracking.mlflow.names import tracking_uri
from b2ray.tracking.show import Progress, cut, save_png, sheet, strip
from b2ray.tracking.system_metrics import SystemMetrics

SEND_EVERY = 60.0  # seconds after which MLflow gets new lines although the stage is not done


@dataclass(frozen=True)
class EvaluationRecord:
    """What a commit stores about the evaluation that followed a stage.

    Attributes:
        entry: what goes into the run's state: the step, the mean scores of each prompt set, and
            those over the first `evaluation.images` pictures, which are comparable over the run.
        figures: the metrics for metrics.jsonl, by name.
        images: files with preview pictures, as paths relative to the run's folder.
    """

    entry: Mapping[str, Any]
    figures: Mapping[str, float]
    images: Sequence[str]


class Recorder:
    """Writes to the run's folder, to MLflow and to the screen.

    It is handed values, and never calls the workers.

    Args:
        config: the run's configuration.
        prompts: the prompt sets, for the pictures of the summary.
        folder: the run's folder, opened for writing.
        log: the MLflow run.

    Attributes:
        state: the last committed state, or that of a new run if there is none.
    """

    def __init__(
        self, config: Config, prompts: PromptSets, folder: RunFolder, log: MlflowLog
    ) -> None:
        self.config, self.prompts, self.folder, self.log = config, prompts, folder, log
        self.progress = Progress(config.curriculum.stages, 0)
        self.state = RunState.new(config.advantage.window)
        self.metrics = SystemMetrics(folder.system_file, config.tracking.system)
        self._since = time.perf_counter()  # the start of the stage in hand
        # A commit's own metrics are written before it, so the next line says how long it took.
        self._committing = 0.0
        self._sent = time.monotonic()

    # --- the life of a run ---------------------------------------------------------------------

    def last_commit(self) -> Checkpoint | None:
        """Read the last committed stage, from which the run resumes; None for a new run."""
        checkpoint = self.folder.last_commit()
        if checkpoint is None:
            return None
        self.state = checkpoint.state
        self.line(f"resuming {self.folder.path} after stage {self.state.stage}")
        self.progress.close()
        self.progress = Progress(self.config.curriculum.stages, self.state.stage)
        return checkpoint

    def begin_stages(self) -> None:
        """Start the clock of the first stage, so that loading models does not count."""
        self._since = time.perf_counter()

    def commit(
        self,
        state: RunState,
        figures: Mapping[str, float],
        evaluation: EvaluationRecord | None,
        weights: State,
        optimizer: State,
        replay: Sequence[ReplayEntry],
    ) -> RunState:
        """Commit a stage: print its line, write its metrics and its checkpoint.

        Args:
            state: the run's state after the stage.
            figures: the metrics of the stage by name.
            evaluation: the evaluation after the stage, if there was one.
            weights: the LoRA after the stage.
            optimizer: the state of the optimizer after the stage.
            replay: the entries that the next stage replays, with their arrays.

        Returns:
            The committed state, which counts the seconds until now.

        Raises:
            ConfigError: the disk refuses.
        """
        now = time.perf_counter()
        seconds = state.counters.get("seconds", 0.0) + now - self._since
        self._since = now
        state = replace(state, counters={**state.counters, "seconds": seconds})
        evaluated = evaluation.figures if evaluation else {}
        self._show(state.stage, figures, evaluated)

        # Metrics come before the checkpoint: a resumed run removes those without a checkpoint.
        costs = {k: v for k, v in state.counters.items() if k != "seconds"}
        times = {"time/commit": self._committing, "time/total": seconds}
        images = list(evaluation.images) if evaluation else []
        self.folder.append_metrics(state.stage, {**figures, **evaluated, **costs, **times}, images)
        self.folder.commit(state, weights, optimizer, replay)
        self._send()
        if state.stage > self.state.stage:
            self.progress.stage_done()
        self.state = state
        self._committing = time.perf_counter() - now
        return state

    def keep_trees(self, stage: int, trees: Sequence[Tree]) -> None:
        """Write the branch trees of a stage; if the disk refuses, warn and go on."""
        if not trees:
            return
        try:
            branch_trees.save(self.folder.path, stage, trees)
        except OSError as error:
            self.line(f"warning: the branch trees of stage {stage} cannot be kept: {error}")

    def keep_traces(self, traces: Mapping[str, bytes]) -> None:
        """Write the traces of actors, by the actor's name; if the disk refuses, warn and go on."""
        try:
            for actor, content in traces.items():
                self.folder.save_trace(actor, content)
        except OSError as error:
            self.line(f"warning: the traces cannot be kept: {error}")

    def finish(self, weights: State) -> dict[str, Any]:
        """Write the final LoRA, the pictures before and after, and the summary.

        Returns:
            The content of summary.json, whose existence marks the run as finished.
        """
        file = lora_file.save(self.folder.lora, weights, self.config.model.lora)
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
        """Write the last system metrics and remove the progress bars from the screen."""
        self.progress.close()
        self.metrics.close()

    # --- the screen ----------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Print a line that stays on the screen, above the progress bars."""
        self.progress.line(text)

    def bar(self, what: str, total: int) -> contextlib.AbstractContextManager[Callable[[int], Any]]:
        """Show a progress bar for one phase; what it yields moves it by a number of pictures.

        Args:
            what: the label of the bar.
            total: the number of pictures of the phase.
        """
        return self.progress.bar(what, total, "image")

    def fleet_event(self, event: Event) -> None:
        """Write an event of a worker into fleet.jsonl, and print it if it has a text."""
        self.folder.append_event(asdict(event))
        if event.line:
            self.line(event.line)

    def machine_readings(self, readings: Sequence[Reading]) -> None:
        """Write the system metrics, and send MLflow new lines once in a while in a long stage."""
        self.metrics.add(readings)
        if self.state.digest and time.monotonic() - self._sent > SEND_EVERY:
            self._send()

    def _send(self) -> None:
        self.log.send()
        self._sent = time.monotonic()

    # --- stages --------------------------------------------------------------------------------

    def _show(
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
        scores = {k: v for k, v in evaluated.items() if k.startswith("eval/")}
        parts += [f"{k.removeprefix('eval/')} {v:.3f}" for k, v in scores.items()]
        self.line(" · ".join(parts))

    # --- evaluations ---------------------------------------------------------------------------

    def keep_evaluation(
        self, stage: int, evaluations: Mapping[str, Evaluation], is_compared: bool
    ) -> EvaluationRecord:
        """Write the scores and the preview pictures of an evaluation.

        Args:
            stage: the number of stages before the evaluation.
            evaluations: the results by the name of the prompt set.
            is_compared: whether it is the first or the last evaluation of the run, the two that the
                summary compares.

        Returns:
            What the commit of the stage stores about the evaluation.
        """
        config = self.config.evaluation
        entry: dict[str, Any] = {"step": stage, "whole": is_compared, "sets": {}}
        figures: dict[str, float] = {}
        images: list[str] = []
        for name, evaluation in evaluations.items():
            self.folder.save_scores(stage, name, evaluation.prompts, evaluation.scores)
            entry["sets"][name] = evaluation.means(len(evaluation.prompts))
            # Every evaluation has at least these pictures, with the same seeds.
            series = evaluation.means(config.images)
            figures |= {f"eval/{name}/{k}": series[k] for k in evaluation.scores}
            if name == "train":
                self._warn_of_hacking(stage, evaluation.scores)
                entry["series"] = series
                figures |= {f"heldout/{r.name}": series[r.name] for r in config.heldout_rewards}
                figures |= {f"diversity/{k}": series[k] for k in DIVERSITY if k in series}
            images += self._keep_pictures(name, stage, evaluation)
        return EvaluationRecord(entry, figures, images)

    def _warn_of_hacking(self, step: int, scores: Mapping[str, np.ndarray]) -> None:
        """Print a warning if the trained reward rises while a held-out reward falls."""
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

    def _keep_pictures(self, name: str, step: int, evaluation: Evaluation) -> list[str]:
        """Write the first pictures of an evaluation, and a sheet of them with their prompts.

        Returns:
            The sheet's path relative to the run's folder; no path if no previews are wanted.
        """
        count = min(self.config.evaluation.previews, len(evaluation.prompts))
        if count == 0:
            return []
        pictures = np.concatenate(evaluation.pictures)[:count]
        folder = self.folder.pictures / f"step-{step:05d}"
        save_png(strip(pictures), self.folder.strip(step, name))
        page = folder / f"preview_{name}.png"
        save_png(sheet(evaluation.prompts[:count], [(f"stage {step}", pictures)]), page)
        return [str(page.relative_to(self.folder.path))]

    def _before_after(self, name: str, prompts: tuple[str, ...]) -> str | None:
        """Write the pictures of the first and the last evaluation side by side, if both exist."""
        first_and_last = self.state.evaluations[0], self.state.evaluations[-1]
        strips = [self.folder.strip(e["step"], name) for e in first_and_last]
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
