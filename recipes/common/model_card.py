"""The README.md of a run: what was done with what, what came out, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.common.run_folder import RunFolder


def figures_table(figures: dict[str, Any]) -> str:
    """A Markdown table of flat figures."""
    rows = [f"| {name} | {show(value)} |" for name, value in figures.items()]
    return "\n".join(["| figure | value |", "|---|---|", *rows])


def show(value: Any) -> str:
    """A figure as a person wants it: 0.1234, 12,345."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def model_card(
    run: RunFolder, summary: str, figures: dict[str, Any], config_yaml: str, environment: dict[str, Any]
) -> str:
    """The card's Markdown. `summary` is the recipe's docstring."""
    title = summary.strip().split("\n")[0]
    parts = [f"# {run.recipe}: {title}", *run.paragraphs, "## Results", figures_table(figures)]
    plots = sorted((run.path / "plots").glob("*.png")) if (run.path / "plots").exists() else []
    parts += [f"![{plot.stem.replace('_', ' ')}](plots/{plot.name})" for plot in plots]
    samples = sorted((run.path / "samples").iterdir()) if (run.path / "samples").exists() else []
    if samples:
        parts += ["## Samples", "\n".join(f"- [{sample.name}](samples/{sample.name})" for sample in samples)]
    parts.append(how_to_load(run))
    if run.choices:
        parts += ["## Chosen for this machine", "\n".join(f"- {what}: {why}" for what, why in run.choices.items())]
    hardware = f"{environment['processor']}, {environment['cores']} cores, {environment['memory_gib']} GiB"
    if environment["gpu"]:
        hardware = f"{environment['gpus']} x {environment['gpu']}; {hardware}"
    parts += ["## Config", f"On {hardware}.", f"```yaml\n{config_yaml.rstrip()}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


OPENED_WITH = {  # the end of an architecture's name -> the class that opens it
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "MTModel": "AutoModelForSeq2SeqLM",
    "BlankInfillingModel": "AutoModelForCausalLM",
}


def how_to_load(run: RunFolder) -> str:
    """The lines of Python that load what the run saved, read off what is in its folder: the model, and the adapter on its base."""
    blocks = [block for block in (_load_model(run.path / "model"), _load_adapter(run.path / "adapter")) if block]
    code = "\n\n".join("```python\n" + "\n".join(block) + "\n```" for block in blocks)
    return f"## How to load it\n\n{code}" if code else ""


def _load_model(folder: Path) -> list[str]:
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    if not (folder / "config.json").exists():
        alone = ["from transformers import AutoTokenizer", "", tokenizer]
        return alone if (folder / "tokenizer.json").exists() else []
    architecture = (json.loads((folder / "config.json").read_text()).get("architectures") or ["AutoModel"])[0]
    auto = next((name for end, name in OPENED_WITH.items() if architecture.endswith(end)), "AutoModel")
    ours = "from recipes.common import modeling_blank_infilling  # registers the model's type"
    return [
        f"from transformers import {auto}, AutoTokenizer",
        *([ours] if architecture == "BlankInfillingModel" else []),
        "",
        f'model = {auto}.from_pretrained("{folder}")',
        tokenizer,
    ]


def _load_adapter(folder: Path) -> list[str]:
    if not (folder / "base.json").exists():
        return []
    about = json.loads((folder / "base.json").read_text())
    labels = f", num_labels={len(about['label_names'])}" if about["label_names"] else ""
    peft = (folder / "adapter_config.json").exists()
    load = "PeftModel.from_pretrained" if peft else "load_adapter"  # ours: of a method that peft lacks
    return [
        "from peft import PeftModel" if peft else "from recipes.common.adapter_files import load_adapter",
        f"from transformers import {about['class']}, AutoTokenizer",
        "",
        f'base = {about["class"]}.from_pretrained("{about["name"]}"{labels})',
        f'model = {load}(base, "{folder}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    ]
