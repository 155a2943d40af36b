"""Whether the Hugging Face hub can give us what a name says: asked once, in a second where the answer is no.

The libraries' own loaders retry five times for each file, half a minute in all, before they say that there is no network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TIMEOUT = 10  # seconds that the hub has to answer

SHOWN = {"model": "model", "dataset": "data set"}


def why_not_on_hub(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why the hub cannot give us the model or data set of this name, in words that go on from "and"; None if it can."""
    if not HUB_ID.fullmatch(name):
        return "it has not the form of a hub id (owner/name)"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = HfApi()
    try:
        if kind == "model":
            hub.model_info(name, timeout=TIMEOUT)
        else:
            hub.dataset_info(name, timeout=TIMEOUT)
    except RepositoryNotFoundError:
        return f"the hub has no public {SHOWN[kind]} of that name (for a private one, log in with `hf auth login`)"
    except Exception as error:  # whatever the HTTP library of the day raises: the text is passed on
        text = (str(error).strip().splitlines() or [""])[0][:300]
        return f"the hub cannot be reached from here ({type(error).__name__}: {text})"
    return None


def is_cached(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Whether an earlier download left something of it on this machine."""
    if not HUB_ID.fullmatch(name):
        return False
    if kind == "dataset":
        import datasets

        return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()
