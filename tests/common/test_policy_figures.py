"""What a policy is told to be, beside the model that it started from; and its own answers, put in order."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import make_model, make_tokenizer

from recipes.common import own_answers, policy_figures
from recipes.common.errors import UserError
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Data, Evaluation

ROWS = [{"prompt": [{"role": "user", "content": "?" * n}], "task": "echo", "answer": "?"} for n in (1, 7, 3, 12, 5)]
EVALUATION = Evaluation(max_samples=5, batch_size=2, max_new_tokens=4)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, recipe="dpo", dry=True)


def moved(model: Any) -> Any:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return other


def test_a_model_is_at_distance_zero_from_itself() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    told = policy_figures.distance(model, model, tokenizer, ROWS, EVALUATION)
    assert told["kl"] == 0 and 1 <= told["response_length"] <= 4


def test_the_distance_is_that_of_each_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batching and padding change nothing, and one token's mean over many draws comes to the exact KL."""
    from recipes.common import generation

    tokenizer = make_tokenizer()
    start = make_model(tokenizer)
    policy = moved(start)
    answers: list[list[int]] = []
    drawn = generation.generate_ids

    def kept(*args: Any, **options: Any) -> Any:
        answers[:] = drawn(*args, **options)
        return answers

    monkeypatch.setattr(generation, "generate_ids", kept)
    told = policy_figures.distance(policy, start, tokenizer, ROWS, EVALUATION)
    prompts = generation.prompt_ids(tokenizer, [row["prompt"] for row in ROWS])
    expected = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            both = [m(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1] for m in (policy, start)]
        a, b = (p.gather(-1, torch.tensor(answer)[:, None]).sum() for p in both)
        expected += float(a - b) / len(prompts)
    assert told["kl"] == pytest.approx(expected, abs=1e-4)

    one = Evaluation(batch_size=1000, max_new_tokens=1)
    told = policy_figures.distance(policy, start, tokenizer, ROWS[:1] * 3000, one)
    with torch.no_grad():
        p, q = (m(torch.tensor(prompts[:1])).logits[0, -1].log_softmax(-1) for m in (policy, start))
    assert told["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=0.15)


def test_of_a_large_vocabulary_a_few_rows_at_a_time_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    prompts, answers = [[5, 6], [7], [8, 9, 10]], [[20, 21, 22], [23], [24, 25]]
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *of: seen.append(of[-1].numel()))
    with torch.no_grad():
        at_once, _ = policy_figures.response_logprobs(model, prompts, answers, 0)
        monkeypatch.setattr(policy_figures, "LOGITS", 7 * len(tokenizer))  # of an answer's 3 tokens: two answers
        parted, mask = policy_figures.response_logprobs(model, prompts, answers, 0)
    assert seen == [rows * 3 * len(tokenizer) for rows in (3, 2, 1)]
    torch.testing.assert_close(parted * mask, at_once * mask, atol=1e-6, rtol=1e-6)


def test_without_its_adapter_a_policy_is_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = make_tokenizer()
    start = make_model(tokenizer)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    policy = get_peft_model(copy.deepcopy(start), config)
    by_adapter = policy_figures.distance(policy, None, tokenizer, ROWS, EVALUATION)
    by_copy = policy_figures.distance(policy, start, tokenizer, ROWS, EVALUATION)
    assert by_adapter == by_copy and by_adapter["kl"] != 0
    assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)


def test_rewards_and_exact_match_stand_beside_it() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    lengths: list[int] = []

    def score(rows: Any, answers: Any) -> list[float]:
        lengths.extend(map(len, answers))
        return [float(len(ids)) for ids in answers]

    told = policy_figures.measure(model, model, tokenizer, ROWS, EVALUATION, score=score)
    assert told.figures["reward"] == pytest.approx(sum(lengths) / 5) == pytest.approx(told.figures["response_length"])
    assert told.figures["exact_match"] == 0 and len(told.answers) == 5


def test_a_prompt_without_room_is_named_or_left_out(run: RunFolder) -> None:
    model = make_model(make_tokenizer(), max_position_embeddings=10)
    asked = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]
    prompts = [[1] * 5, [1] * 9, [1] * 12]
    with pytest.raises(UserError, match=r"row 2 \('question 1'\) is 9 tokens long, .* x 4 within .* 10; so are 1 more"):
        policy_figures.check_room(asked, prompts, model, 4, "x", Data(), run)
    with pytest.raises(UserError, match=r"row 3 .* is 12 tokens, longer than the context of 10"):
        policy_figures.check_room(asked, prompts, model, 1, "x", Data(), run)
    assert policy_figures.check_room(asked, prompts, model, 4, "x", Data(on_bad_row="skip"), run) == [0]


# ---------------------------------------------------------------- own answers


def test_every_row_gets_its_own_answers_the_same_for_a_seed() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    told = own_answers.sample_answers(model, tokenizer, ROWS, 3, EVALUATION, seed=5)
    assert [len(some) for some in told] == [3] * 5
    assert told == own_answers.sample_answers(model, tokenizer, ROWS, 3, EVALUATION, seed=5)
    assert len({answer.text for some in told for answer in some}) > 5


def test_whether_an_answer_ended_is_told_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.common import generation

    tokenizer = make_tokenizer()
    a, stop = tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id
    monkeypatch.setattr(generation, "generate_ids", lambda *_, **__: [[a, stop], [a, a]])
    told = own_answers.sample_answers(make_model(tokenizer), tokenizer, ROWS[:1], 2, EVALUATION)
    assert told == [[("a", True), ("aa", False)]]


def test_the_checker_scores_and_refuses_rows_without_one() -> None:
    assert own_answers.checker_scores(ROWS[:1], [list(map(own_answers.Answer, "?!"))]) == [[1.0, 0.0]]
    with pytest.raises(UserError, match="no checker"):
        own_answers.checker_scores([{"prompt": []}], [["?"]])


def test_a_reward_model_scores_what_it_would_score_alone() -> None:
    from transformers import AutoModelForSequenceClassification

    tokenizer = make_tokenizer()
    config = make_model(tokenizer).config
    config.num_labels = 1
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    judge.config.reward_mean, judge.config.reward_std = 2.0, 0.5
    answers = [["a", "bcd"], ["efghi"], [], ["j", "k", "lm"], ["n"]]
    written = [[own_answers.Answer(text, text != "n") for text in some] for some in answers]  # "n" was cut
    told = own_answers.reward_scores(judge, tokenizer, ROWS, written, batch_size=2)
    assert [len(some) for some in told] == [2, 1, 0, 3, 1]
    messages = [*ROWS[3]["prompt"], {"role": "assistant", "content": "lm"}]
    ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)])
    with torch.no_grad():
        alone = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    assert told[3][2] == pytest.approx((alone - 2.0) / 0.5, abs=1e-4)
    prompt = tokenizer.apply_chat_template(ROWS[4]["prompt"], add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([[*prompt, *tokenizer("n")["input_ids"]]])  # and gets no stop token
    with torch.no_grad():
        alone = judge(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    assert told[4][0] == pytest.approx((alone - 2.0) / 0.5, abs=1e-4)
