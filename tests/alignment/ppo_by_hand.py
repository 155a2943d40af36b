"""PPO's pieces put together by hand, in fp32 on one process: for the tests of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from recipes.alignment import ppo
from recipes.common import ppo_rollout, rlhf
from recipes.common.sections import Data, Evaluation, Model, Run


class Setup:
    """The recipe's pieces, put together by hand in fp32 on one process."""

    def __init__(
        self,
        tiny: Path,
        judge: Path | None,
        bf16: bool = False,
        micro: int = 4,
        accumulate: int = 1,
        function: Any = None,
        lora: Any = None,
        **knobs: object,
    ):
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
            TrainingArguments,
        )

        from recipes.common.training import make_accelerator

        self.tokenizer = AutoTokenizer.from_pretrained(tiny)
        arguments = TrainingArguments(
            output_dir="unused",
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            use_cpu=True,
            bf16=bf16,
        )
        knobs = {"rollouts": 8, "max_new_tokens": 5, **knobs}
        self.config = ppo.Config(Model(), Data(), ppo.PPO(**knobs), arguments, Evaluation(), Run(), lora)  # type: ignore[arg-type]
        self.accelerator = ppo.count_accumulation(make_accelerator(arguments))
        self.policy = AutoModelForCausalLM.from_pretrained(tiny)
        self.reference = self.reward_model = critic = None
        if lora is None:
            self.reference = AutoModelForCausalLM.from_pretrained(tiny).eval().requires_grad_(False)
        else:
            self.policy = ppo.adapted(self.policy, self.config)
        if judge is not None:
            self.reward_model = AutoModelForSequenceClassification.from_pretrained(judge).eval().requires_grad_(False)
            if self.config.ppo.critic == "separate":
                critic = AutoModelForSequenceClassification.from_pretrained(judge)
        self.model = rlhf.ActorCritic(self.policy, critic, getattr(self.reward_model, "config", None))
        rlhf.disable_dropout(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        # 8 prompts of different lengths
        self.rows = [{"prompt": [{"role": "user", "content": "Is it 3" + "?" * n}], "n": n} for n in range(1, 9)]
        self.prompts = [rlhf.prompt_ids(self.tokenizer, row["prompt"]) for row in self.rows]  # type: ignore[arg-type]
        self.models = ppo_rollout.Models(self.model, self.reference, self.reward_model, self.tokenizer, function)

    def collect(self, seed: int = 0, oversample: int = 1) -> ppo_rollout.Rollout:
        longest = self.config.ppo.max_new_tokens
        return ppo.collect(
            self.models, self.rows, self.prompts, self.config, self.accelerator,
            longest=longest, seed=seed, answers=self.config.ppo.answers, oversample=oversample,
        )  # fmt: skip

    def rows_of(self, rollout: ppo_rollout.Rollout) -> Any:
        return ppo_rollout.rows_of(self.models, rollout.all, rollout.kept, rollout.answers, "cpu")

    def update(self, rollout: ppo_rollout.Rollout, beta: float = 0.05, **more: Any) -> dict[str, float]:
        return ppo.update(self.models, self.optimizer, rollout, beta, self.config, self.accelerator, seed=0, **more)


def answer_in_lengths(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Eight answers of 1 to 5 tokens, in place of sampled ones: a random model hardly ever ends one."""
    from recipes.common import generation

    ids = [[*range(20 + n, 20 + n + n % 5), tokenizer.eos_token_id] for n in range(8)]
    monkeypatch.setattr(generation, "generate_ids", lambda *_, **__: [list(one) for one in ids])


class Whole(NamedTuple):
    """A rollout as B rows of a prompt, padded on the left to P tokens, and its answer, padded on the right to R."""

    input_ids: torch.Tensor  # [B, P+R]
    attention_mask: torch.Tensor  # [B, P+R]
    prompt_length: int  # P


def whole(rollout: ppo_rollout.Rollout) -> Whole:
    left, left_mask = rlhf.pad([rollout.all.prompts[i] for i in rollout.kept], 0, "left")
    right, mask = rlhf.pad([rollout.all.ids[i] for i in rollout.kept], 0, "right")
    return Whole(torch.cat([left, right], dim=1), torch.cat([left_mask, mask], dim=1), left.shape[1])


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def digest(parameters: Any) -> int:
    return hash(tuple(p.detach().numpy().tobytes() for p in parameters))
