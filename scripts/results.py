"""Collect the figures of the finished runs and put them into README.md, README.zh-CN.md and RESULTS.md.

    make results                # collect runs/<recipe>/default of this machine, and .../real (CONFIG=real)
    make results ARGS=--render  # only write the tables again from benchmarks/*.json

The figures live in benchmarks/recipes.json, with the machine that they were measured on; the tables are made from it.
The other files of that folder are `make bench`'s: RESULTS.md's table of ratios is made from them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.common.launch import recipes, summary  # noqa: E402
from recipes.common.model_card import show  # noqa: E402
from recipes.common.run_folder import write_atomically  # noqa: E402

STORE = ROOT / "benchmarks" / "recipes.json"

# What several figures are, English and Chinese.
PACKAGES_TOLD = ("of held-out docstrings put to their package, 512 labels", "留出文档串归包正确（512 个标注）")
PAIRS_RIGHT = ("held-out pairs ranked right", "留出对排序正确")
SUMMARY_LOSS = ("nats a token of a docstring's first sentence", "奈特/摘要词元")
# What stands in the table of the README: figure, what it is (English, Chinese), its baseline.
HEADLINES: dict[str, list[tuple[str, str, str, str | None]]] = {
    "tokenizer": [("bytes_per_token", "bytes a token", "字节/词元", "baseline_bytes_per_token")],
    "llama": [("bits_per_byte", "bits a byte, held-out files", "比特/字节（留出文件）", "xz_primed_bits_per_byte")],
    "bert": [
        ("classification_accuracy", *PACKAGES_TOLD, "baseline_classification_accuracy"),
        ("eval_loss", "nats a hidden token", "奈特/被遮词元", "unigram_loss"),
    ],
    "gpt": [
        ("pydocs_package_accuracy", *PACKAGES_TOLD, "baseline_pydocs_package_accuracy"),
        ("eval_loss", "nats a token", "奈特/词元", "unigram_loss"),
    ],
    "glm": [
        ("classification_accuracy", *PACKAGES_TOLD, "baseline_classification_accuracy"),
        ("generation_loss", *SUMMARY_LOSS, "baseline_generation_loss"),
    ],
    "t5": [
        ("eval_loss", "nats a token of the spans cut out", "奈特/被删片段词元", "unigram_loss"),
        (
            "task_translation",
            "of held-out questions translated exactly",
            "留出问题翻译完全正确",
            "baseline_task_translation",
        ),
        (
            "task_classification",
            "of held-out packages written right",
            "留出文档串写对包名",
            "baseline_task_classification",
        ),
    ],
    "bart": [
        ("generation_loss", *SUMMARY_LOSS, "baseline_generation_loss"),
        ("translation_loss", "nats a token of a translation", "奈特/译文词元", "baseline_translation_loss"),
        ("classification_accuracy", *PACKAGES_TOLD, "baseline_classification_accuracy"),
    ],
    "unilm": [
        ("classification_accuracy", *PACKAGES_TOLD, "baseline_classification_accuracy"),
        ("generation_loss", *SUMMARY_LOSS, "baseline_generation_loss"),
    ],
    "adapter_fusion": [
        ("eval_loss", "nats a token of a new task, 100 rows", "奈特/词元（新任务，100 行）", "target_alone_loss"),
    ],
    "madx": [
        (
            "exact_match",
            "tasks right in a language never trained on",
            "未训练语言的任务正确",
            "not_swapped_exact_match",
        ),
    ],
    "multi_adapter": [
        ("exact_match", "tasks right, each by its own adapter", "各任务用自己的适配器，正确", "others_exact_match"),
    ],
    "p_tuning_v2": [
        ("macro_f1", "mean F1 of the kinds of Python tokens", "Python 词元各类别的平均 F1", "majority_macro_f1"),
    ],
    "reward_model": [
        ("reward_accuracy", *PAIRS_RIGHT, "baseline_accuracy"),
        ("head_accuracy", "by the head alone", "只用标量头", "baseline_words_accuracy"),
    ],
}
TASKS_RIGHT = ("exact_match", "held-out tasks exactly right", "留出任务完全正确", "baseline_exact_match")
SAMPLED = (
    "sampled_exact_match",
    "held-out tasks right, sampled",
    "留出任务正确（采样）",
    "baseline_sampled_exact_match",
)
for _name in (
    "full", "bitfit", "prefix_tuning", "prompt_tuning", "p_tuning", "lora", "adalora", "qlora", "ia3", "adapter"
):  # fmt: skip
    HEADLINES[_name] = [TASKS_RIGHT]
for _name in ("ppo", "dpo", "grpo"):
    HEADLINES[_name] = [SAMPLED, ("exact_match", "greedy", "贪心", "baseline_exact_match")]

# The same of the runs on real data (`make <recipe> CONFIG=real`).
MULTI30K = ("BLEU, Multi30k English to German, test_2016", "BLEU（Multi30k 英译德，test_2016）")
ALPACA_LOSS = ("nats a token, Alpaca, English and Chinese", "奈特/词元（Alpaca 中英文）")
REAL: dict[str, list[tuple[str, str, str, str | None]]] = {
    "t5": [("task_translation_bleu", *MULTI30K, "baseline_task_translation_bleu")],
    "bart": [("translation_bleu", *MULTI30K, "baseline_translation_bleu")],
    "bert": [
        (
            "classification_accuracy",
            "of CLINC150's test intents, 10 labels a class",
            "CLINC150 测试意图正确（每类 10 个标注）",
            "baseline_classification_accuracy",
        )
    ],
    "gpt": [
        (
            "eval_loss_per_character",
            "nats a character, tiny-shakespeare, held out",
            "奈特/字符（tiny-shakespeare 留出部分）",
            "unigram_loss_per_character",
        )
    ],
    "llama": [
        ("bits_per_byte", "bits a byte, tiny-shakespeare", "比特/字节（tiny-shakespeare）", "xz_primed_bits_per_byte")
    ],
    "full": [("eval_loss", *ALPACA_LOSS, "baseline_loss")],
    "lora": [("eval_loss", *ALPACA_LOSS, "baseline_loss")],
    "p_tuning_v2": [("accuracy", "of CLINC150's test intents", "CLINC150 测试意图正确", "baseline_accuracy")],
    "reward_model": [
        (
            "reward_accuracy",
            "hh-rlhf's harmless pairs, held out",
            "hh-rlhf 无害偏好对（留出）",
            "baseline_words_accuracy",
        )
    ],
}

CHINESE = {  # what each recipe is, for the Chinese README; the English one has the first line of its docstring
    "tokenizer": "分词器：在同一份文本上用四种方法训练，在留出文本上比较，保存想要的那一个。",
    "llama": "LLaMA：从零开始，以预测下一个词元预训练解码器。",
    "bert": "BERT：预训练能看两侧的编码器：补出被遮的词，判断两段文本是否相接；之后做分类。",
    "gpt": "GPT-1、GPT-2、GPT-3：同一个目标，三种 Transformer，三种完成任务的办法。",
    "bart": "BART：预训练编码器-解码器，把被破坏的文本写回来；之后分类、生成、翻译。",
    "t5": "T5：预训练编码器-解码器，写回被删去的片段；之后一切任务都是文本到文本。",
    "unilm": "UniLM：一个 Transformer、四种注意力掩码，既会理解也会生成。",
    "glm": "GLM：用自回归填空预训练一个模型，既会理解也会生成。",
    "full": "全参数微调：教预训练模型回答问题，所有权重都可以动。",
    "bitfit": "BitFit：只微调偏置，其余冻结。",
    "prefix_tuning": "前缀微调：冻结模型，学习放在每一层最前面的键和值。",
    "prompt_tuning": "提示微调：冻结模型，学习放在每行前面的几个词元的向量。",
    "p_tuning": "P-tuning：冻结模型，学习站在模板词语之间的词元的向量。",
    "p_tuning_v2": "P-tuning v2：每一层都有提示（学到的键和值），用于分类和序列标注。",
    "lora": "LoRA：冻结模型，把每个选中的权重矩阵的变化学成两个瘦矩阵的乘积。",
    "adalora": "AdaLoRA：边学边剪去奇异值，把秩的预算花在要紧的地方。",
    "qlora": "QLoRA：冻结的模型存成四比特，上面是全精度的 LoRA。",
    "ia3": "IA3：冻结模型，给每个键、值和前馈层内部激活学一个系数。",
    "adapter": "Adapter：冻结模型，在各层的部件之间学习小的瓶颈网络。",
    "adapter_fusion": "AdapterFusion：每个任务先训练一个适配器并冻结，再用目标任务的少量数据学习该听谁的。",
    "madx": "MAD-X：任务适配器下面放语言适配器，把任务带到从未见过的语言。",
    "multi_adapter": "一个底座，多个适配器：全部装入、切换、加权合并、对外服务。",
    "reward_model": "奖励模型：带标量头的语言模型，训练到好的回答得分更高。",
    "ppo": "PPO：让对话模型在学到的奖励上变好，又不离起点太远。",
    "dpo": "DPO：直接从偏好学习，策略自己的对数概率就是奖励模型。",
    "grpo": "GRPO：没有价值网络的强化学习，一个回答与同一提示的其他回答比较。",
}


def collect(root: Path) -> dict[str, Any]:
    """metrics.json and environment.json of the finished runs under `root`: "t5" is t5's default run, "t5 real" the one on real data."""
    found = {}
    for recipe, run in product(recipes(), ("default", "real")):
        name, folder = recipe if run == "default" else f"{recipe} {run}", root / recipe / run
        if (folder / "metrics.json").exists():
            environment = json.loads((folder / "environment.json").read_text())
            machine = {key: environment[key] for key in ("processor", "cores", "memory_gib", "gpu", "gpus", "commit")}
            found[name] = {"figures": json.loads((folder / "metrics.json").read_text()), "machine": machine}
    return found


def table(stored: dict[str, Any], chinese: bool = False) -> str:
    """A Markdown row a recipe: what it is, what it reached, the baseline, how long it took."""
    head = "| 配方 | 内容 | 结果 | 基线 | 用时 |" if chinese else "| recipe | what it is | result | baseline | took |"
    lines = [head, "|---|---|---|---|---|"]
    for name, path in recipes().items():
        what = CHINESE.get(name, summary(path)) if chinese else summary(path)
        if name not in stored:
            lines.append(f"| [{name}]({path.relative_to(ROOT)}) | {what} | | | |")
            continue
        cells = result_cells(stored[name]["figures"], HEADLINES.get(name, []), chinese)
        lines.append(f"| [{name}]({path.relative_to(ROOT)}) | {what} | {cells} |")
    return "\n".join(lines)


def real_table(stored: dict[str, Any], chinese: bool = False) -> str:
    """A Markdown row a run on real data: what it reached, the baseline, how long it took."""
    head = "| 命令 | 结果 | 基线 | 用时 |" if chinese else "| command | result | baseline | took |"
    rows = [
        f"| `make {name} CONFIG=real` | {result_cells(stored[f'{name} real']['figures'], REAL[name], chinese)} |"
        for name in recipes()
        if name in REAL and f"{name} real" in stored
    ]
    return "\n".join([head, "|---|---|---|---|", *rows])


def result_cells(figures: dict[str, Any], headlines: list[tuple[str, str, str, str | None]], chinese: bool) -> str:
    """Three cells of a row: the result, its baseline, the seconds."""
    known = [h for h in headlines if h[0] in figures]
    result = "; ".join(f"**{show(figures[key])}** {zh if chinese else en}" for key, en, zh, _ in known)
    baseline = "; ".join(show(figures[base]) if base in figures else "" for *_, base in known)
    return f"{result} | {baseline} | {figures['wall_seconds']:.0f} s"


def details(stored: dict[str, Any]) -> str:
    """RESULTS.md's section a recipe: every figure of its laptop run and the machine."""
    parts = []
    for name, entry in stored.items():
        machine = entry["machine"]
        hardware = f"{machine['processor']}, {machine['cores']} core{'s' * (machine['cores'] != 1)}, {machine['memory_gib']} GiB, GPU: {machine['gpu'] or 'none'}"
        rows = "\n".join(f"| {key} | {show(value)} |" for key, value in entry["figures"].items())
        parts.append(
            f"### {name}\n\nMeasured on {hardware}; commit {machine['commit']}.\n\n| figure | value |\n|---|---|\n{rows}"
        )
    return "\n\n".join(parts)


def benchmarks(folder: Path) -> list[dict[str, Any]]:
    """What `make bench` left, here and then on GPUs, a dictionary a row of it, in the order in which bench.py measures."""
    from scripts.bench import ROWS

    order = {name: place for place, name in enumerate(ROWS)}
    stored = [path for path in (*folder.glob("*.json"), *folder.glob("*/*.json")) if path.stem != STORE.stem]
    stored.sort(key=lambda path: (path.parent != folder, path.parent, order.get(path.stem, len(order)), path.stem))
    return [json.loads(path.read_text()) for path in stored]


def ratios(found: list[dict[str, Any]]) -> str:
    """A Markdown row a peer (or a goal): the two figures, how many times better ours is, where and when it was measured."""
    lines = ["| what | ours | peer | ours is better by | unit | machine | date |", "|---|---|---|---|---|---|---|"]
    for row in found:
        machine = row["machine"]
        where = f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}"
        when = f"{row['unit']} | {where} | {row['measured_at'][:10]} |"
        for peer, ratio in row["ours_is_better_by"].items():
            ours, theirs = row["figures"]["ours"], row["figures"][peer]
            better = f"**{ratio['median']:.2f}** x ({ratio['min']:.2f} to {ratio['max']:.2f})"
            lines.append(f"| {row['what']} | {show(ours)} | {show(theirs)}: {peer} | {better} | {when}")
        if "goal" in row:  # figures of ours alone, that are to be below it
            for name, value in row["figures"].items():
                lines.append(f"| {row['what']}, {name} | {show(value)} | goal: below {show(row['goal'])} | | {when}")
    return "\n".join(lines) if found else "Not measured yet: `make bench`."


def put(path: Path, mark: str, content: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->` in a file."""
    text = path.read_text()
    pattern = re.compile(rf"<!-- {mark} -->.*?<!-- /{mark} -->", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"error: {path} has no <!-- {mark} --> ... <!-- /{mark} -->")
    write_atomically(path, pattern.sub(lambda _: f"<!-- {mark} -->\n\n{content}\n\n<!-- /{mark} -->", text))


def main(argv: list[str]) -> int:
    """Collect (unless --render) and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the tables again")
    asked = parser.parse_args(argv)
    stored = json.loads(STORE.read_text()) if STORE.exists() else {}
    if not asked.render:
        stored |= collect(Path("runs"))
        write_atomically(STORE, json.dumps(stored, indent=2) + "\n")
    put(ROOT / "README.md", "results", table(stored))
    put(ROOT / "README.zh-CN.md", "results", table(stored, chinese=True))
    put(ROOT / "README.md", "real", real_table(stored))
    put(ROOT / "README.zh-CN.md", "real", real_table(stored, chinese=True))
    put(ROOT / "RESULTS.md", "details", details(stored))
    put(ROOT / "RESULTS.md", "bench", ratios(benchmarks(STORE.parent)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
