"""The README.md of a run: what was done with what, what came out, how to load it."""

from __future__ import annotations

import json
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


def how_to_load(run: RunFolder) -> str:
    """The lines of Python that load what the run saved, read off what is in its folder."""
    config, adapter = run.path / "model" / "config.json", run.path / "adapter" / "adapter_config.json"
    lines = []
    if config.exists():
        architecture = (json.loads(config.read_text()).get("architectures") or ["AutoModel"])[0]
        auto = {
            "ForCausalLM": "AutoModelForCausalLM",
            "ForSequenceClassification": "AutoModelForSequenceClassification",
            "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
            "ForPreTraining": "AutoModelForPreTraining",
            "BlankInfillingModel": "AutoModelForCausalLM",
        }
        name = next((cls for end, cls in auto.items() if architecture.endswith(end)), "AutoModel")
        lines = [
            f"from transformers import {name}, AutoTokenizer",
            "",
            f'model = {name}.from_pretrained("{run.path}/model")',
        ]
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{run.path}/model")')
        if architecture == "BlankInfillingModel":
            lines.insert(1, "from recipes.common import modeling_blank_infilling  # registers the model's type")
    elif (run.path / "model" / "tokenizer.json").exists():
        lines = [
            "from transformers import AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{run.path}/model")',
        ]
    if adapter.exists():
        lines += [
            "",
            "from peft import PeftModel",
            "",
            f'model = PeftModel.from_pretrained(base, "{run.path}/adapter")',
        ]
    elif (run.path / "adapter" / "adapter.json").exists():  # a method that peft lacks
        lines += [
            "",
            "from recipes.common.adapter_files import load_adapter",
            "",
            f'model = load_adapter(base, "{run.path}/adapter")',
        ]
    return "## How to load it\n\n```python\n" + "\n".join(lines).strip() + "\n```" if lines else ""
