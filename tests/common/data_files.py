"""Small files of questions, a builtin set's stand-in, and what the data door says is wrong: for the door's tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from recipes.common.data import load_data
from recipes.common.errors import UserError
from recipes.common.sections import Data


def qa(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(start, start + count)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def questions(rows: Any) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


def problems(*args: Any, **section: Any) -> list[str]:
    """What load_data says is wrong."""
    kind: Any = args[0] if args else "conversation"
    with pytest.raises(UserError) as caught:
        load_data(Data(**section), kind)
    return caught.value.problems


def write_parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
