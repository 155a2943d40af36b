"""Rows of like length in a batch, so that little of it is padding, in an order that a resumed run finds again.

For training.train_sampling_strategy: group_by_length. transformers' own sampler draws from the global random state, which
a resumed run has in another place: it would see other rows from there on. And it leaves every 50 batches sorted, the
longest rows first: a model with few numbers to learn follows the lengths up and down (prefix_tuning's loss jumped every
50 steps). Here the batches are shuffled, all but the first, whose longest row shows at once whether memory is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def group_by_length(trainer: Trainer, lengths: Sequence[int]) -> None:
    """For training.train_sampling_strategy: group_by_length. The order of each epoch follows from the seed and the epoch."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    args = trainer.args

    class Groups(LengthGroupedSampler):
        def __iter__(self) -> Iterator[int]:
            rows = list(super().__iter__())
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            whole = len(rows) // self.batch_size  # a last one with fewer rows stays the last
            order = (torch.randperm(max(whole - 1, 0), generator=self.generator) + 1).tolist()
            for batch in [*batches[:1], *[batches[i] for i in order], *batches[max(whole, 1) :]]:
                yield from batch

        def set_epoch(self, epoch: int) -> None:  # accelerate calls it
            self.generator = torch.Generator().manual_seed(args.seed + epoch)

    def sampler(_: Any = None) -> Groups:
        groups = Groups(args.train_batch_size * args.gradient_accumulation_steps, lengths=list(lengths))
        groups.set_epoch(0)
        return groups

    def in_order(rows: Any) -> Any:  # scored in their order: theirs would look for lengths in the rows
        return torch.utils.data.SequentialSampler(rows) if args.world_size <= 1 else None

    trainer._get_train_sampler = sampler  # type: ignore[method-assign, assignment]
    trainer._get_eval_sampler = in_order  # type: ignore[method-assign, assignment]
