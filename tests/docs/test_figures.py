"""docs/howto/read_figures.md has every figure that a run writes, and no other."""

from __future__ import annotations

import json
import re

from b2ray.sweep.trials import FIGURES
from tests.docs.pages import ROOT, spans
from tests.docs.sandbox import Sandbox

# By rewards or prompt sets, too: their names are not in the code.
NAMED = "|".join(FIGURES)
KINDS = "|".join(sorted({*FIGURES} - {"eval", "heldout", "reward"}))
PAGE = {s for s in spans("docs/howto/read_figures.md") if re.match(rf"({NAMED})/\w", s)}
SOURCE = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "b2ray").rglob("*.py"))
CODE = set(re.findall(rf'"((?:{KINDS})/[a-z_]+)"', SOURCE))
# The beginnings of names that the code puts together, by role or by kind.
BEGUN = tuple(re.findall(rf'f"((?:{KINDS})/[a-z_]*)\{{', SOURCE))


def general(name: str) -> str:
    """A figure's name as the page has it: with NAME for a reward's, and NN for a step's."""
    name = re.sub(r"step_\d\d$", "step_NN", name)
    return re.sub(r"^((?:eval/\w+|heldout|reward)/)(?!reward$|mean$)\w+$", r"\1NAME", name)


def test_the_page_has_the_figures_of_the_code() -> None:
    assert len(CODE) > 20
    assert not CODE - PAGE
    fixed = {name for name in PAGE if re.fullmatch(rf"(?!diversity)({KINDS})/[a-z_]+", name)}
    assert not {name for name in fixed - CODE if not name.startswith(BEGUN)}


def test_the_page_has_the_figures_of_a_run(sandbox: Sandbox) -> None:
    lines = (sandbox.prepared / "metrics.jsonl").read_text().splitlines()
    found = {key for line in lines for key in json.loads(line)} - {"step", "time", "images"}
    assert not {general(name) for name in found} - {*PAGE, "interval"}
