"""What the tests of the four prompt methods have in common: padding, the cache, and an adapter beside its base."""

from __future__ import annotations

from typing import Any

import torch

ROWS = [list(range(20, 32)), list(range(40, 47))]  # ids of two rows, 12 and 7 tokens


def batch_of(rows: list[list[int]], left: bool) -> dict[str, torch.Tensor]:
    """The rows padded with 0, on the left or on the right."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def check_padding(model: Any, rows: list[list[int]] = ROWS, given: bool = False) -> None:
    """Every token of a padded row gets the logits that it has in the row alone, whichever side is padded.

    given: with the positions that generation gives, where the base itself does not read them off the mask.
    """
    model.eval()
    with torch.no_grad():
        for i, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row])).logits[0]
            for left in (False, True):
                batch = batch_of(rows, left)
                positions = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)} if given else {}
                padded = model(**batch, **positions).logits[i]
                assert torch.allclose(padded[batch["attention_mask"][i].bool()], alone, atol=1e-5), (i, left)


def check_class_padding(model: Any, rows: list[list[int]] = ROWS, sides: tuple[bool, ...] = (False, True)) -> None:
    """The same of a classifier's logits, one set a row."""
    model.eval()
    with torch.no_grad():
        for i, row in enumerate(rows):
            alone = model(input_ids=torch.tensor([row])).logits[0]
            for left in sides:
                assert torch.allclose(model(**batch_of(rows, left)).logits[i], alone, atol=1e-5), (i, left)


def check_generation(model: Any, rows: list[list[int]] = ROWS, new: int = 6) -> None:
    """Left-padded generation with the cache gives the scores that it gives without, and those of whole forward passes."""
    model.eval()
    batch = batch_of(rows, left=True)
    width = batch["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached = model.generate(**batch, **options, use_cache=True)
        plain = model.generate(**batch, **options, use_cache=False)
        assert torch.equal(cached.sequences, plain.sequences)
        for with_cache, without in zip(cached.scores, plain.scores, strict=True):
            assert torch.allclose(with_cache, without, atol=1e-4)
        for i, row in enumerate(rows):
            written = cached.sequences[i, width:].tolist()
            logits = model(input_ids=torch.tensor([row + written])).logits[0, len(row) - 1 : -1]
            for step, scores in enumerate(cached.scores):
                assert torch.allclose(scores[i], logits[step], atol=1e-4), (i, step)


def check_written(model: Any, rows: list[list[int]] = ROWS, new: int = 6) -> None:
    """An encoder-decoder writes the same with the cache and without, in company and alone."""
    model.eval()
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad():
        cached = model.generate(**batch_of(rows, left=False), **options, use_cache=True)
        plain = model.generate(**batch_of(rows, left=False), **options, use_cache=False)
        for with_cache, without in zip(cached.scores, plain.scores, strict=True):
            assert torch.allclose(with_cache, without, atol=1e-4)
        for i, row in enumerate(rows):
            alone = model.generate(input_ids=torch.tensor([row]), **options)
            for scores, own in zip(cached.scores, alone.scores, strict=True):
                assert torch.allclose(scores[i], own[0], atol=1e-4)


def spread(model: Any, place: str = "prompt", scale: float = 0.5) -> None:
    """Give a prompt numbers that are not near zero, so that a fault of a position shows."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in getattr(model, place).parameters():
            parameter.normal_(std=scale)


def save_louder(folder: Any, times: float = 8.0) -> Any:
    """Make the layers of a saved random model louder, so that what stands in a row reaches the head; gives the folder."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(times)
    model.save_pretrained(folder)
    return folder
