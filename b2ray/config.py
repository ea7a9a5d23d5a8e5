"""What a run is: frozen pydantic models, each field explained beneath itself.

The docstrings are the help of the command line. This module imports neither torch nor ray, so that
a wrong configuration is refused before anything heavy starts. How files, presets and the command
line become a `Config` is in `options.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from b2ray.discretion import first_secret

Preset = Literal["b2", "b2_released", "ddpo", "bpt_only", "bs_only"]
Positive = Annotated[int, Field(ge=1)]
# summary.json has one entry per held-out reward, beside these.
SUMMARY_WORDS = (
    *("name", "seed", "stages", "reward", "diversity", "reward_queries"),
    *("unet_evals", "seconds", "files", "evaluations"),
)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Lora(Section):
    rank: Positive = 4
    """Rank of the low-rank update."""
    alpha: float = Field(4.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    targets: tuple[str, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Module names in the UNet that get an adapter (the attention's q, k, v and out)."""


class Model(Section):
    """The base model and its adapter."""

    path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """A Stable Diffusion 1.x, 2.x or XL pipeline: a hub id, a local folder, or one .safetensors
    file. A relative path is looked up from the working directory, then from where b2ray is
    installed."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Which of several weights of a folder or hub id, for example `fp16`."""
    config: str | None = None
    """For a single .safetensors file: the hub id or folder whose configuration files describe it;
    empty lets diffusers choose, which asks the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights and stored latents; densities and LoRA stay float32."""
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the decoder; auto is `dtype`, or float32 where float16 overflows."""
    channels_last: bool = False
    """Keep the UNet's weights in channels-last order, which some GPUs convolve faster."""
    compile: bool = False
    """Compile the UNet with torch.compile: minutes at the start, faster calls after."""
    gradient_checkpointing: bool = False
    """Compute the UNet's activations again when learning instead of keeping them: less memory."""
    offload: bool = False
    """Keep the text encoders and the VAE off the GPU while they are idle."""
    vae_slicing: bool = False
    """Decode one picture at a time: less memory."""
    vae_tiling: bool = False
    """Decode large pictures in overlapping tiles: less memory, faint seams."""
    lora: Lora = Lora()


class Prompts(Section):
    """What is drawn for training, and what is only looked at."""

    train: str
    """The prompts that training draws from: a .txt file (one a line), .jsonl or .csv (with `prompt`
    and, if wanted, `weight`), or a built-in set such as `template1.train` or `animals`."""
    heldout: str | None = None
    """Unseen prompts, for evaluation only: likewise, for example `template1.test`."""


class Sampling(Section):
    """The denoising process."""

    steps: int = Field(20, ge=2)
    """T, the number of denoising steps."""
    guidance: float = Field(5.0, ge=0)
    """Classifier-free guidance scale; at 1 or less the unconditional half is not computed."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """How much of the guided output's standard deviation is set back to the conditional one's
    (arXiv 2305.08891, section 3.4); 0.7 suits schedules that end in pure noise."""
    eta: float = Field(1.0, ge=0, le=1)
    """Stochasticity of the DDIM step; 1 is ancestral sampling. 0 has no density to train."""
    height: Positive | None = None
    """Height of the pictures in pixels; empty is the model's own."""
    width: Positive | None = None
    """Width of the pictures in pixels; empty is the model's own."""


class Curriculum(Section):
    """Backward progressive training: stage to interval."""

    stages: Positive = 100
    """How many stages the run has."""
    start: float | None = Field(None, gt=0)
    """The first interval: a number of steps, or below 1 a fraction of T; empty means all T."""
    end: float | None = Field(None, gt=0)
    """The last interval, likewise."""
    growth: float = Field(1.0, gt=0)
    """Exponent of the growth over the run: 1 is linear, more stays late for longer."""


class Branching(Section):
    """Branch-based sampling: groups, forks and how they are cut into calls."""

    images: Positive = 1280
    """Final images (reward queries) per stage; as many whole groups as fit are sampled."""
    branches: Positive = 5
    """K, the continuations that share one prefix."""
    unit_groups: Positive = 8
    """Groups per work unit: the prefix batch, and what is dispatched, retried and replayed."""
    branch_batch: Positive = 20
    """Branches per denoising call."""


class Selection(Section):
    """Which leaves of a group are trained on."""

    kind: Literal["all", "best_worst"] = "best_worst"
    """Every leaf, or the best and the worst of each group."""
    best_above: float | None = None
    """Keep the best leaf only if its advantage is at least this."""
    worst_below: float | None = None
    """Keep the worst leaf only if its advantage is below this."""
    require_pair: bool = False
    """Train on a group only if both its best and its worst leaf are kept."""
    min_gap: float = Field(1e-6, ge=0)
    """Groups whose rewards spread by no more than this carry no signal and are skipped."""


class Advantage(Section):
    """How much better than expected a leaf is."""

    center: Literal["group", "prompt"] = "group"
    """Subtract the mean of the leaf's own group, or of its prompt's window."""
    window: int = Field(8, ge=0)
    """Earlier stages whose rewards of the same prompt count in the mean and the spread."""
    min_count: int = Field(2, ge=2)
    """With fewer rewards of a prompt than this, the statistics of all prompts stand in."""
    clamp: float = Field(5.0, gt=0)
    """Largest absolute advantage."""


class Objective(Section):
    """What the update maximises."""

    kind: Literal["ppo"] = "ppo"
    """PPO-clip."""
    clip_nats: float = Field(1.6384, gt=0)
    """Clip range in nats of a whole step's log-likelihood. Divided by the number of latent elements
    it is the usual range: 1.6384 is DDPO's 1e-4 on Stable Diffusion's 16 384 elements, and the
    same joint range on a model of any other size."""
    kl_weight: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the base model, per latent element, as in DPOK (arXiv
    2305.16381): holds the policy near the base model, most of all where a step has little noise.
    Above 0 it costs one more forward pass in learning."""
    step_weights: Literal["none", "inverse_gradient"] = "none"
    """Weigh the steps of a trajectory alike, or by the inverse of how strongly a step's density
    depends on the predicted noise: the last steps otherwise drown out the early ones."""


class Learner(Section):
    """The optimizer."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """Keep the rate, or let it fall in a straight line from stage to stage, to 0 after the last."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    passes: Positive = 2
    """Passes over a stage's selected trajectories."""
    batch: Positive = 128
    """Trajectories per optimizer step; the last, smaller one is weighted by its true count."""
    microbatch: Positive = 16
    """(Trajectory, step) pairs per UNet call."""
    recompute_log_probs: bool = False
    """Compute the old log-probabilities again in the learner, at its batch shape, instead of using
    the sampler's; costs one more forward pass."""
    max_ratio_drift: float = Field(0.1, gt=0)
    """Largest mean |ratio - 1| before the first update, as a fraction of the clip range."""
    max_lag: int = Field(0, ge=0, le=1)
    """Versions that a trajectory may be behind the weights that learn from it; 1 lets the next
    stage's sampling overlap the update."""
    threads: Positive = 1
    """torch threads of the learner on a CPU; sums over more threads round differently."""
    ranks: Positive = 1
    """Processes that share every optimizer step's trajectories and add up their gradients; sums
    over more ranks round differently."""


class Workers(Section):
    count: Positive = 1
    """Actors of this role."""
    cpus: float = Field(0.5, ge=0)
    """Logical CPUs that Ray reserves for each."""
    gpus: float = Field(0.0, ge=0)
    """GPUs (or a fraction) for each; 0 runs on the CPU."""


class RewardWorkers(Workers):
    runtime_env: dict[str, Any] = {}
    """Ray's runtime_env for these processes, for example {"pip": [...]}: packages that the rest of
    the run does not have, or has in another version. Passwords and tokens are refused in it."""


class Reward(Section):
    name: Name
    """The name in logs and figures."""
    kind: str
    """A built-in reward, or your own function or class as `module:name`."""
    path: str | None = None
    """The reward model: a local folder or a hub id; empty is the kind's usual one."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    weight: float = 1.0
    """Factor in the sum that is trained on."""
    scale: Annotated[float, Field(gt=0)] | Literal["window"] = 1.0
    """Before it is weighted a score is divided by this number, or, with `window`, standardised over
    this reward's own scores of the last stages (`advantage.window`)."""
    batch: Positive = 32
    """Pictures per call of the reward model."""
    options: dict[str, Any] = {}
    """Settings of this kind of reward; docs/rewards.md lists them."""
    workers: RewardWorkers | None = None
    """Processes of its own, with their own number, devices and Python environment; empty: scored in
    fleet.scorers, with the other rewards."""


class Evaluation(Section):
    """Measured on fixed seeds; never trained on."""

    every: int = Field(10, ge=0)
    """Evaluate after every so many stages (0: only before and after)."""
    images: Positive = 64
    """Pictures at the evaluations in between, on the training prompts."""
    final_images: Positive = 256
    """Pictures before and after the run, on each prompt set."""
    batch: Positive = 32
    """Pictures per denoising call."""
    previews: int = Field(8, ge=0)
    """Pictures of each evaluation that are kept and shown."""
    heldout_rewards: tuple[Reward, ...] = ()
    """Rewards that are measured and never trained on."""


class Samplers(Section):
    min: Positive = 1
    """Samplers without which the run does not go on."""
    max: Positive | Literal["auto"] = 2
    """Samplers that are asked for. Those without room wait for a node, which an autoscaler sees as
    demand. `auto`: as many as the nodes have room for, one per free GPU, as nodes come and go."""
    cpus: float = Field(0.5, ge=0)
    """Logical CPUs that Ray reserves for each."""
    gpus: float = Field(0.0, ge=0)
    """GPUs (or a fraction) for each; 0 runs on the CPU."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max == "auto" and self.cpus == self.gpus == 0:
            raise ValueError("max is auto, but cpus and gpus are 0: any number has room; set one")
        if self.max != "auto" and self.max < self.min:
            raise ValueError(f"max is {self.max}, below min, which is {self.min}: raise max")
        return self


class LearnerWorker(Section):
    cpus: float = Field(0.5, ge=0)
    """Logical CPUs that Ray reserves for each rank of the learner."""
    gpus: float = Field(0.0, ge=0)
    """GPUs (or a fraction) for each rank of the learner; 0 runs on the CPU."""


class Fleet(Section):
    """Sizes and patience: nothing here changes the result."""

    samplers: Samplers = Samplers()
    scorers: Workers = Workers(count=1, cpus=0.25)
    learner: LearnerWorker = LearnerWorker()
    address: str | None = None
    """A Ray cluster to join; empty starts Ray here, or joins the job's own (RAY_ADDRESS)."""
    wait_for_nodes: float = Field(0.0, ge=0)
    """Seconds to wait for nodes that an autoscaler still has to start; 0 refuses a cluster without
    room for the run at once."""
    start_timeout: float = Field(300.0, gt=0)
    """Seconds that an actor may take to start, and again to load its model."""
    stall_timeout: float = Field(900.0, gt=0)
    """Stop if nothing has finished for this many seconds."""
    retries: int = Field(3, ge=0)
    """Times a call is done again after its worker died; also restarts in a row of one worker."""
    max_deaths: Positive = 50
    """Deaths of workers within `death_window` after which the run gives up."""
    max_preemptions: Positive = 1000
    """The same for workers whose node was taken away."""
    death_window: float = Field(600.0, gt=0)
    """Seconds over which deaths are counted."""


class Tracking(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server, without a password; empty means MLFLOW_TRACKING_URI, else a SQLite file
    beside the runs."""
    experiment: str = "b2ray"
    """MLflow experiment."""


class Config(BaseSettings):
    """Fine-tune a text-to-image diffusion model against a reward with B²-DiffuRL, on Ray."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    name: Name = "run"
    """The run's name: everything it writes is in runs/NAME."""
    runs: str = Field("runs", pattern=r"^[^\x00]+$")
    """Folder of all runs. In a Ray job with --working-dir a relative one is under $B2RAY_HOME, else
    under the home folder on the head node."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random."""
    cpu_threads: Positive = 1
    """torch threads of each sampler and scorer on a CPU."""
    preset: Preset = "b2"
    """Method of the paper's table: curriculum, branches, selection, advantage and clip range."""
    model: Model = Model()
    prompts: Prompts
    sampling: Sampling = Sampling()
    curriculum: Curriculum = Curriculum()
    branching: Branching = Branching()
    selection: Selection = Selection()
    advantage: Advantage = Advantage()
    objective: Objective = Objective()
    learner: Learner = Learner()
    rewards: tuple[Reward, ...] = Field(min_length=1)
    """What is trained on: a list of {name, kind, path, weight, …}; on the command line as JSON."""
    evaluation: Evaluation = Evaluation()
    fleet: Fleet = Fleet()
    tracking: Tracking = Tracking()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Environment variables such as NAME or SEED must not reach into a run.
        return (init_settings,)

    @field_validator("curriculum")
    @classmethod
    def _whole_steps(cls, value: Curriculum) -> Curriculum:
        for field in ("start", "end"):
            steps = getattr(value, field)
            if steps is not None and steps >= 1 and steps != int(steps):
                raise ValueError(
                    f"curriculum.{field} is {steps}: give a whole number of steps, "
                    "or a fraction of T below 1"
                )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in (
            self._interval_problem(),
            self._signal_problem(),
            self._selection_problem(),
            self._learner_problem(),
            self._name_problem(),
            self._secret_problem(),
        ):
            if problem:
                raise ValueError(problem)
        return self

    def _interval_problem(self) -> str | None:
        start, end = self.interval_bounds
        steps = self.sampling.steps
        if max(start, end) > steps:
            return (
                f"curriculum.start..end is {start}..{end} but sampling.steps is {steps}: "
                "an interval cannot be longer than T; lower it or raise sampling.steps"
            )
        if end < start:
            return f"curriculum.end ({end}) is below curriculum.start ({start}): swap them"
        return None

    def _signal_problem(self) -> str | None:
        if self.sampling.eta == 0:
            return "sampling.eta is 0: the steps have no density to train; use up to 1.0"
        if self.branching.branches > self.branching.images:
            return (
                f"branching.branches is {self.branching.branches} but branching.images is "
                f"{self.branching.images}: not one group fits; raise images"
            )
        needs = (
            "advantage.center=group"
            if self.advantage.center == "group"
            else "selection.kind=best_worst with require_pair"
            if self.selection.kind == "best_worst" and self.selection.require_pair
            else None
        )
        if self.branching.branches < 2 and needs:
            return (
                f"branching.branches is {self.branching.branches} but {needs} compares the "
                "branches of one group: use at least 2, or --preset=ddpo"
            )
        return None

    def _selection_problem(self) -> str | None:
        best, worst = self.selection.best_above, self.selection.worst_below
        if best is not None and worst is not None and worst > best:
            return (
                f"selection.worst_below ({worst}) is above selection.best_above ({best}): "
                "the thresholds overlap; make worst_below the smaller one"
            )
        return None

    def _learner_problem(self) -> str | None:
        if self.learner.max_lag and self.learner.recompute_log_probs:
            return (
                f"learner.max_lag is {self.learner.max_lag} and learner.recompute_log_probs is "
                "true: recomputing would take the learner's weights for the older ones that "
                "sampled; set learner.recompute_log_probs=false, or learner.max_lag=0"
            )
        return None

    def _name_problem(self) -> str | None:
        names = [r.name for r in self.all_rewards]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            return f"reward name {twice!r} is used twice: names must differ in logs"
        # The summary has one entry per held-out reward beside these.
        taken = {"mean", "pairwise", "vendi", "step", *SUMMARY_WORDS}
        clash = next((n for n in names if n in taken), None)
        return f"reward name {clash!r} is a word of the summary: choose another" if clash else None

    def _secret_problem(self) -> str | None:
        field = first_secret(self.model_dump(mode="json"))
        if field is None:
            return None
        return (
            f"{field} holds a password or token, which would be written to config.yaml: leave it "
            "out and set it in the environment (docs/security.md says how)"
        )

    @property
    def all_rewards(self) -> tuple[Reward, ...]:
        """The rewards that are trained on, then those that are only measured."""
        return (*self.rewards, *self.evaluation.heldout_rewards)

    @property
    def groups(self) -> int:
        """Groups per stage."""
        return self.branching.images // self.branching.branches

    @property
    def interval_bounds(self) -> tuple[int, int]:
        """First and last interval in steps."""
        steps = self.sampling.steps

        def whole(value: float | None) -> int:
            if value is None:
                return steps
            return max(1, math.floor(value * steps + 0.5)) if value < 1 else int(value)

        return whole(self.curriculum.start), whole(self.curriculum.end)

    def identity(self) -> dict[str, object]:
        """What decides the result: everything but names, places, the fleet and tracking."""
        values = self.model_dump(mode="json", exclude={"name", "runs", "fleet", "tracking"})
        for reward in (*values["rewards"], *values["evaluation"]["heldout_rewards"]):
            del reward["workers"]
        return values
