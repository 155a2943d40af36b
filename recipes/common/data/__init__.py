"""One door for all data: a builtin set, a local file or folder, or a hub data set, as canonical rows in splits.

    load_data(config.data, "conversation") -> DatasetDict with "train" and "validation" ("test" where the source has it)

What a canonical row is, and which schemas are recognised, is in formats.py. Where the rows come from is here:

    sources.py   what a name stands for: builtin set, file, folder, hub; which splits it has
    readers.py   files as raw rows, with errors that name the line; the columns of a row that is a list are "0", "1", ...
    rows.py      a canonical row's types and content, and the report of bad ones
    splits.py    which split is held out, or which rows of the training split
    tables.py    all rows in Arrow                    streams.py   one row at a time
    images.py    images with a class or a caption     words.py     how messages are put
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes.common import formats
from recipes.common.data.images import load_images
from recipes.common.data.rows import row_bytes
from recipes.common.data.sources import Part, Source, open_source
from recipes.common.data.splits import cut_document, held_out
from recipes.common.data.streams import load_streams
from recipes.common.data.tables import load_tables
from recipes.common.data.words import each, say
from recipes.common.errors import UserError
from recipes.common.formats import Kind
from recipes.common.sections import Data

if TYPE_CHECKING:
    import datasets

__all__ = ["Part", "Source", "cut_document", "held_out", "load_data", "row_bytes", "say"]

STREAMED = ("text", "conversation")  # the kinds of which a recipe can learn one row at a time


def load_data(data: Data, kind: Kind, few: bool = False) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load what the `data` section names, as canonical rows of `kind`.

    Returns a DatasetDict with "train" and "validation", and "test" where the source has one that is not held out already;
    with data.streaming, for text and conversations alone, an IterableDatasetDict. The columns are
        text: text (str)                    conversation: messages [, tools]
        preference: prompt, completions, ranks [, tools]
        prompt: prompt [, tools], and all the other columns of the source
        classification: text, text_pair (null where there is one text), label      pair: source, target
        scored_pair: text, text_pair, label (a number)
        image: image, label                 image_caption: image, caption
    and those that a builtin set adds of its own. "tools" is there where the source has any (in a stream: always), a
    JSON list in a string, null where a row has none.

    What is held out: data.validation_split, else the source's validation (or valid, val, dev, eval) split, else its
    test split, else data.validation_fraction of the training rows, chosen by data.seed and the rows' content; of a
    single text file, its end. No training row also stands, word for word, in a held-out split: such rows are left out
    and counted (streams with a validation split of their own cannot be checked so).

    data.columns may map `split`, where a column says which split a row is of. A folder of parallel text (train.en,
    train.de, ...) has a column for each language; as "text", without data.columns, it is the lines of all of them.

    A list in data.name is each of them, one after the other, each with its own held-out rows, then shuffled together
    by data.seed, so that data.max_samples takes from all of them (a stream is not shuffled).

    `few`: a builtin set that takes long may give fewer rows of each class, enough for a dry run.

    Rows are held in memory as Arrow, above 512 MB in an unnamed file that is memory-mapped. Raises UserError with
    everything that is wrong (up to 10 different problems, the rest counted).
    """
    names = [data.name] if isinstance(data.name, str) else list(data.name)
    problems = formats.check_columns(data.columns)
    if not names:
        problems.append("data.name: the list is empty")
    problems += ["data.name: is blank"] * any(not name.strip() for name in names)
    if data.validation_split is not None and data.validation_split == data.split:
        problems.append(
            f"data.validation_split: {data.split!r} is the training split too; name another, "
            "or leave it out to hold out data.validation_fraction"
        )
    if data.streaming and kind not in STREAMED:
        problems.append(
            f"data.streaming: {formats.HOLDS[kind]} are chosen from and come up more than once, so they are read whole; leave it out"
        )
    if problems:
        raise UserError(problems)
    if kind in ("image", "image_caption"):
        return load_images(names, data, kind)
    sources = each(names, lambda name: open_source(name, data, kind, few))
    streams = [source.streams for source in sources]
    if data.streaming and all(streams):
        return load_streams(sources, data, kind)
    if data.streaming and any(streams):
        whole = ", ".join(source.name for source in sources if not source.streams)
        raise UserError(
            f"data.streaming: {whole} has to be read whole and cannot stand beside streams; make it JSON lines"
        )
    splits = load_tables(sources, data, kind)
    if data.streaming:  # whatever has to be read whole anyhow: a text file, a JSON array, a builtin set
        import datasets

        return datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    return splits
