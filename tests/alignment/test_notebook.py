"""The alignment chapter's notebook: what its pages show, and that it runs again from nothing."""

from __future__ import annotations

import json
import re
import resource
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_notebooks import bare, cells, run, source  # noqa: F401  (bare and run are fixtures)

CHAPTER = ROOT / "notebooks/04_alignment.ipynb"
SECTIONS = {  # a word of the heading: what its code takes from the repository
    "ranked answers": "rlhf.ranking_loss",
    "last real token": "rlhf.last_real_token",
    "estimators": "rlhf.kl_estimate",
    "advantage": "rlhf.generalized_advantages",
    "clip": "rlhf.policy_loss",
    "PPO": "rlhf.leave_one_out_advantages",
    "DPO": "dpo.make_trainer",
    "GRPO": "rlhf.whiten_groups",
}


def test_every_section_has_its_equation_its_function_and_a_picture() -> None:
    sections: list[list[Any]] = []
    for cell in json.loads(CHAPTER.read_text())["cells"]:
        if re.match(r"## \d\. ", source(cell)):
            sections.append([])
        if sections:
            sections[-1].append(cell)
    by_title = {source(section[0]).splitlines()[0]: section for section in sections}
    for word, function in SECTIONS.items():
        (section,) = (section for title, section in by_title.items() if re.search(rf"\b{word}\b", title))
        assert any("$$" in source(cell) for cell in section if cell["cell_type"] == "markdown"), word
        code = [cell for cell in section if cell["cell_type"] == "code"]
        assert any(function in source(cell) for cell in code), word
        assert any("image/png" in o.get("data", {}) for cell in code for o in cell["outputs"]), word


def over_optimised(told: str) -> None:
    """Free of the penalty the true score rises and then falls far below its start while the learned reward rises; on the
    leash both rise."""
    found = re.findall(
        r"^(.{13}) learned reward (\S+) -> (\S+), true score (\S+) -> (\S+) \(best (\S+) at", told, re.MULTILINE
    )
    runs = {name.strip(): [float(x) for x in figures] for name, *figures in found}
    assert len(runs) == 2
    for name, (reward, reward_after, score, score_after, best) in runs.items():
        assert reward_after > reward + 0.5, name
        if name == "KL left free":
            assert score_after < score - 1 and best > score + 0.2
        else:
            assert score_after > score + 0.2


def test_the_committed_pages_show_over_optimisation() -> None:
    outputs = [o for cell in cells(CHAPTER, "code") for o in cell["outputs"]]
    over_optimised("".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream"))


@pytest.mark.slow
def test_it_runs_without_network_or_runs(run: Any) -> None:  # noqa: F811
    code = cells(CHAPTER, "code")
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    told = run([source(cell) for cell in code])
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 240  # seconds of the processor
    committed = sum("image/png" in o.get("data", {}) for cell in code for o in cell["outputs"])
    assert told.count("picture 1") == told.count("picture") == committed
    assert "this machine's run" not in told and "ppo: benchmarks/recipes.json" in told
    over_optimised(told)
