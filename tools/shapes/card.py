"""Stage ``card`` writes the model card, ``README.md``, from the measured figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.shapes import aesthetic, imagereward, reward, text, unet, vae
from tools.shapes.common import Settings, write_text
from tools.shapes.facts import read

_RATED = ("auc_clean_degraded", "correlation", "mean_clean", "mean_degraded")
_COMPARED = ("samples", "auc", "samples_mean", "samples_std")
_TEMPLATE = Path(__file__).with_name("card.md")


def build(settings: Settings) -> None:
    """Write the card, which needs the figures of all stages but ``prompts``."""
    stages = ("vae", "text", "unet", "reward", "aesthetic", "imagereward")
    facts = {name: read(settings, name) for name in (*stages, "evaluate", "benchmark")}
    missing = [name for name, values in facts.items() if not values]
    if missing:
        raise FileNotFoundError(f"The card needs the figures of stage {missing[0]}: run it first.")
    trained = {name: facts[name] for name in stages}
    values: dict[str, Any] = {
        "seed": settings.seed,
        "colours": 6,
        "shapes": 5,
        "dropout": unet.DROPOUT,
        "total": _total(trained),
        "rows": "\n".join(_row(row) for row in facts["benchmark"]["rows"]),
        "batch": facts["benchmark"]["batch"],
        **{f"{name}_m": trained[name]["parameters"] / 1e6 for name in stages},
        **{f"{name}_steps": trained[name]["steps"] for name in stages},
        **{f"{name}_minutes": trained[name]["minutes"] for name in stages},
        "vae_batch": vae.BATCH,
        "text_batch": text.BATCH,
        "unet_batch": unet.BATCH,
        "reward_batch": 3 * reward.FAMILIES_PER_STEP,
        "aesthetic_batch": aesthetic.BATCH,
        "imagereward_batch": 3 * imagereward.FAMILIES_PER_STEP,
        "low": facts["evaluate"]["reward_cosine_deciles"][0],
        "high": facts["evaluate"]["reward_cosine_deciles"][-1],
        "visible": aesthetic.VISIBLE,
        **{f"aesthetic_{k}": facts["aesthetic"][k] for k in _RATED},
        **{f"imagereward_{k}": facts["imagereward"][k] for k in _COMPARED},
        **{k: facts["vae"][k] for k in ("mean_error_levels", "judged_right")},
        **facts["evaluate"],
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    write_text(settings.out / "README.md", template.format(**values))


def _total(trained: dict[str, dict[str, Any]]) -> float:
    """Minutes of the longest chain of stages of which each waits for the one before."""
    minutes = {name: float(values["minutes"]) for name, values in trained.items()}
    until_unet = max(minutes["vae"], minutes["text"]) + minutes["unet"]
    after_vae = max(minutes["reward"], minutes["aesthetic"])
    return max(until_unet + minutes["imagereward"], minutes["vae"] + after_vae)


def _row(row: dict[str, Any]) -> str:
    """A row of the card's table from a row of the benchmark."""
    shape = row["shape"]
    if shape == "shipped":
        shape = f"**{', '.join(map(str, unet.SHAPE['block_out_channels']))}; attention below**"
    return (
        f"| {shape} | {row['parameters'] / 1e6:.2f} M | {row['forward_ms']:.2f} "
        f"| {row['forward_backward_ms']:.2f} | {row['forward_backward_lora_ms']:.2f} |"
    )
