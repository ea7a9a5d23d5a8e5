"""The floor: a stage's UNet evaluations, decoding and scoring in a bare loop, and nothing else.

One process a core, each with one thread and an equal share, every call at the batch size that was
fastest in that process while the others were as busy. What a run takes longer is what it could
save: waiting, noise, arithmetic around the UNet, messages, commits.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from b2ray.config import Config
from benchmarks.speed.workloads import Work

SIZES = (4, 8, 16, 32, 64, 128)  # batches that are tried
LOAD_WITHIN = 600.0  # seconds


@dataclass(frozen=True)
class Passed:
    """What a pass over a stage's work took, in seconds.

    Attributes:
        seconds: from the first process's begin to the last one's end.
        parts: of each kind of work, the mean over the processes.
    """

    seconds: float
    parts: dict[str, float]


class Floor:
    """Processes that have the model loaded and their batch sizes found.

    Args:
        config: whose model, rewards and prompts are used.
        processes: how many work side by side.
        sizes: batches that are tried.
    """

    def __init__(self, config: Config, processes: int, sizes: Sequence[int] = SIZES) -> None:
        context = multiprocessing.get_context("spawn")
        together = context.Barrier(processes)
        self._workers, self._pipes = [], []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(config, theirs, together, tuple(sizes)), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(process)
            self._pipes.append(ours)
        self.best = [_answer(pipe, LOAD_WITHIN) for pipe in self._pipes]

    def measure(self, work: Work) -> Passed:
        """Do a stage's work once."""
        for rank, pipe in enumerate(self._pipes):
            pipe.send(work.share(rank, len(self._pipes)))
        found = [_answer(pipe, 3600.0) for pipe in self._pipes]
        # CLOCK_MONOTONIC is the machine's: the processes' own readings can be compared.
        seconds = max(end for _, end, _ in found) - min(began for began, _, _ in found)
        kinds = found[0][2]
        return Passed(seconds, {k: sum(p[k] for _, _, p in found) / len(found) for k in kinds})

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._workers:
            process.join(10)
            process.kill()


def calls(total: int, size: int) -> list[int]:
    """Sizes of the calls that do `total` rows: whole ones, then what is left."""
    return [size] * (total // size) + ([total % size] if total % size else [])


def fastest(seconds: dict[int, float]) -> int:
    """The batch size with the least time per row, of what each took."""
    return min(seconds, key=lambda size: seconds[size] / size)


def _answer(pipe: Connection, patience: float) -> Any:
    if not pipe.poll(patience):
        raise TimeoutError(f"a process of the floor said nothing for {patience:g} s")
    found = pipe.recv()
    if isinstance(found, Exception):
        raise found
    return found


def _serve(config: Config, pipe: Connection, together: Any, sizes: tuple[int, ...]) -> None:
    """One process: find the batch sizes, then do what is asked for until the pipe closes."""
    try:
        kinds = loops(config)
        best = {}
        for kind, call in kinds.items():
            seconds = {}
            for size in sizes:
                together.wait(LOAD_WITHIN)  # so that all try the same at one time
                call(size)
                seconds[size] = min(_timed(call, size) for _ in range(2))
            best[kind] = fastest(seconds)
        pipe.send(best)
        while True:
            try:
                work = pipe.recv()
            except EOFError:
                return
            together.wait(LOAD_WITHIN)
            pipe.send(_do(kinds, best, work))
    except Exception as error:
        pipe.send(error)


def _do(
    kinds: dict[str, Callable[[int], None]], best: dict[str, int], work: Work
) -> tuple[float, float, dict[str, float]]:
    asked = {"sampling": work.sampled, "decoding": work.pictures, "scoring": work.pictures}
    parts = dict.fromkeys(["sampling", "decoding", "scoring", "learning"], 0.0)
    began = time.perf_counter()
    for part, total in asked.items():
        parts[part] = sum(_timed(kinds[part], n) for n in calls(total, best[part]))
    parts["learning"] = sum(
        _timed(kinds[kind], n)
        for kind, total in (("sampling", work.scored_again), ("learning", work.trained))
        for n in calls(total, best[kind])
    )
    return began, time.perf_counter(), parts


def _timed(call: Callable[[int], None], size: int) -> float:
    began = time.perf_counter()
    call(size)
    return time.perf_counter() - began


def loops(config: Config) -> dict[str, Callable[[int], None]]:
    """Each kind of work as a function of how many latents, or pictures, are in its batch."""
    import numpy as np
    import torch

    from b2ray.diffusion.policy import Policy
    from b2ray.preflight import check_files
    from b2ray.rewards import Panel

    torch.set_num_threads(1)
    device = torch.device("cpu")
    policy = Policy(config, device)
    prompts = list(check_files(config).trained())
    policy.prepare(prompts)
    panel = Panel(config.rewards, device)
    unet, vae = policy.pipeline.unet, policy.pipeline.vae
    halves = 2 if config.sampling.guidance > 1 else 1
    rng = np.random.default_rng(0)

    def inputs(size: int) -> tuple[Any, Any, dict[str, Any]]:
        x = torch.from_numpy(
            rng.standard_normal((halves * size, *policy.latent_shape), dtype="f4")
        ).to(policy.dtype)
        t = policy.schedule.timesteps[torch.arange(halves * size) % policy.schedule.steps]
        text, added = policy.encode([prompts[j % len(prompts)] for j in range(halves * size)])
        more = {"added_cond_kwargs": added} if added else {}
        return x, t, {"encoder_hidden_states": text, **more}

    kept: dict[tuple[str, int], Any] = {}

    def once(kind: str, size: int, make: Callable[[int], Any]) -> Any:
        if (kind, size) not in kept:
            kept[kind, size] = make(size)
        return kept[kind, size]

    @torch.no_grad()
    def sampling(size: int) -> None:
        x, t, more = once("unet", size, inputs)
        unet(x, t, **more)

    def learning(size: int) -> None:
        x, t, more = once("unet", size, inputs)
        unet(x, t, **more).sample.float().mean().backward()

    @torch.no_grad()
    def decoding(size: int) -> None:
        latents = once("latents", size, lambda n: torch.randn(n, *policy.latent_shape))
        vae.decode(latents.to(vae.dtype))

    def scoring(size: int) -> None:
        height, width = policy.picture_size
        pictures = once(
            "pictures", size, lambda n: rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
        )
        texts = [prompts[j % len(prompts)] for j in range(size)]
        panel.score(pictures, texts, [r.name for r in config.rewards])

    return {
        "sampling": sampling,
        "learning": learning,
        "decoding": decoding,
        "scoring": scoring,
    }
