"""Models and tokenizers from the `model` section: a hub id, a local folder, what another recipe made, or a fresh config."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipes.common.adapter_files import base_of, is_adapter
from recipes.common.errors import UserError
from recipes.common.hub import is_cached, why_not_on_hub
from recipes.common.run_folder import RunFolder
from recipes.common.sections import Model
from recipes.common.sharding import launched_with

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
LARGE = 500_000_000  # parameters above which a dry run does not fill the weights
# What a recipe is told when another one needs its result: the tokenizer's would train four kinds to compare them.
MADE_WITH: dict[str, tuple[str, ...]] = {"tokenizer": ("--tokenizer.kinds", "[bpe]")}


def ensure_made(name: str, run: RunFolder) -> str:
    """Make what `name` points at if it is another recipe's result that is not there yet, and give the path.

    `runs/llama/default/model` is what `make llama` leaves; on a fresh machine the recipes that later ones stand on run
    first, once, with their laptop config (MADE_WITH: no more of it than is needed). So does a run that bears the name of
    one of the recipe's configs: `runs/tokenizer/multi30k/model` is `make tokenizer CONFIG=multi30k`'s. Other names come
    back as they are.
    """
    made = re.fullmatch(r"(.*?)([\w-]+)/([\w-]+)/(model|adapter)/?", name)
    if made is None or Path(name).exists():
        return name
    root, recipe, run_name, _ = made.groups()
    scripts = [p for p in (ROOT / "recipes").glob(f"*/{recipe}.py") if p.parent.name != "common"]
    if not scripts or Path(root or ".").name != "runs":
        return name
    variant = ROOT / "configs" / scripts[0].parent.name / recipe / f"{run_name}.yaml"
    make = f"make {recipe} CONFIG={run_name}" if variant.exists() else f"make {recipe}"
    if run.dry or int(os.environ.get("WORLD_SIZE", "1")) > 1 or (run_name != "default" and not variant.exists()):
        raise UserError(f"{name} is not there yet: `{make}` makes it")
    run.say(f"{name} is not there yet: running `{make}` first")
    begun = Path(name).parent / "config.yaml"  # of a run that was interrupted: it goes on under its own config
    how = ["--config", str(begun), "--run.resume", "true"] if begun.exists() else [*MADE_WITH.get(recipe, ())]
    if variant.exists() and not begun.exists():
        how += ["--config", str(variant), "--run.name", run_name]
    command = [sys.executable, str(scripts[0]), "--run.root", root.rstrip("/"), *how]
    launched = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE")
    alone = {key: value for key, value in os.environ.items() if not key.startswith(launched)}  # whatever this run is
    code = subprocess.run(command, cwd=Path.cwd(), env={**alone, "PYTHONPATH": str(ROOT)}, check=False).returncode
    if code != 0:
        raise UserError(f"{name} could not be made: `{make}` ended with exit code {code}; its messages are above")
    return name


def _from_pretrained(what: str, load: Any, name: str, **options: Any) -> Any:
    """Call a `from_pretrained`; what it cannot find or read becomes one clear UserError."""
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.exists():
        siblings = [str(p) for p in path.parent.glob("*")] if path.parent.exists() else []
        near = difflib.get_close_matches(name, siblings, n=1)
        raise UserError(f"model: no such folder: {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if looks_local and (path / "metrics.jsonl").exists():
        holds = [name for name in ("model", "adapter") if (path / name).is_dir()]
        raise UserError(
            f"model: {name} is the folder of a run"
            + (f"; give {' or '.join(str(path / kept) for kept in holds)}" if holds else ", which has saved no model")
        )
    if (
        looks_local
        and what == "model"
        and not ((path / "config.json").exists() or (path / "adapter_config.json").exists())
    ):
        raise UserError(
            f"model: {name} holds no config.json, so it is not a saved model; point at the folder that holds it"
        )
    if not looks_local and (reason := why_not_on_hub(name, "model")):
        if not is_cached(name, "model"):
            raise UserError(_no_such(what, name, reason))
        options["local_files_only"] = True  # what an earlier run fetched serves without a network too
    try:
        return load(name, **options)
    except ImportError as error:  # a kernel, or what the tokenizer or the quantisation is written with
        key = (
            "model.attention" if "attention" in str(error).lower() else f"model: the {what} in {name} cannot be loaded"
        )
        raise UserError(f"{key}: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        if "attention implementation" in str(error):
            raise UserError(
                f"model.attention: {options.get('attn_implementation')} is not there for the {what} in {name}: set eager"
            ) from error
        if looks_local:
            raise UserError(f"model: the {what} in {name} cannot be loaded: {first_line(error)}") from error
        raise UserError(_no_such(what, name, f"the hub does not give it ({first_line(error)})")) from error
    except Exception as error:
        # SafetensorError is a plain Exception; sizes that config.json does not have are a RuntimeError
        if type(error).__name__ != "SafetensorError" and "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(f"model: the {what} in {name} cannot be loaded: {first_line(error)}") from error


def _no_such(what: str, name: str, reason: str) -> str:
    return (
        f"model: no {what} `{name}`: it is not a local folder, and {reason}; "
        "check the name, the network (HF_HUB_OFFLINE), and `hf auth login` for gated models"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened, for a message of ours."""
    text = str(error).strip().split("\n")[0]
    return text if len(text) <= 200 else text[:197] + "..."


def load_tokenizer(model: Model, run: RunFolder, *, chat: bool = False, writes: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of the model section. `chat=True` requires a chat template, `writes=False` no end-of-text token.

    Raises UserError if there is none to load, or if it lacks what is required.
    """
    from transformers import AutoTokenizer

    name = model.tokenizer or model.name
    if name is None:
        raise UserError("model.tokenizer: a model from scratch (model.config) needs a tokenizer: a folder or a hub id")
    name = ensure_made(name, run)
    revision = model.revision if model.tokenizer in (None, model.name) else None  # it is one of model.name
    tokenizer = _from_pretrained("tokenizer", AutoTokenizer.from_pretrained, name, revision=revision)
    if model.chat_template:
        path = Path(model.chat_template)
        if not path.is_file():
            raise UserError(f"model.chat_template: no such file: {path}")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"model.chat_template: {path} is not UTF-8 text: {error}") from error
    if chat and not tokenizer.chat_template:
        raise UserError(f"the tokenizer {name} has no chat template: give one with model.chat_template (a Jinja file)")
    if tokenizer.eos_token is None and writes:
        raise UserError(f"the tokenizer {name} has no end-of-text token (eos_token), so no answer could ever end")
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        raise UserError(f"the tokenizer {name} has neither a padding nor an end-of-text token (pad_token, eos_token)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # only padding positions carry it, and those are masked
    return tokenizer


def wrong_fields(kind: Any, fields: dict[str, Any]) -> dict[str, str]:
    """What is wrong with single fields of `model.config`, by dotted key; nothing where transformers does not know the model_type (yet)."""
    from transformers import CONFIG_MAPPING

    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return {}
    config_class = CONFIG_MAPPING[kind]
    known = _fields_of(config_class)
    problems = {}
    for key, value in fields.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            problems[f"model.config.{key}"] = f"model.config.{key} is not a field of {config_class.__name__}" + (
                f"; did you mean `{near[0]}`?" if near else ""
            )
        elif (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and key.endswith(SIZES)
            and not key.endswith("_id")
            and value <= 0
        ):
            problems[f"model.config.{key}"] = f"model.config.{key} is {value}: it must be above 0"
    return problems


def _fields_of(config_class: Any) -> set[str]:
    return set(config_class().to_dict()) | {"rope_theta"}


def fresh_config(fields: dict[str, Any], vocabulary: int | None) -> Any:
    """A library config from `model.config`: model_type and that class's fields, each checked. The tokenizer gives vocab_size."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    fields = dict(fields)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise UserError("model.config needs a model_type, such as `model_type: llama`")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        raise UserError(
            f"model.config.model_type: transformers has no `{kind}`" + (f"; did you mean `{near[0]}`?" if near else "")
        )
    config_class = CONFIG_MAPPING[kind]
    known = _fields_of(config_class)
    if problems := wrong_fields(kind, fields):
        raise UserError(list(problems.values()))
    if vocabulary is not None:
        fields.setdefault("vocab_size", vocabulary)
        for name in known & {"bos_token_id", "eos_token_id", "pad_token_id"}:
            fields.setdefault(
                name, None
            )  # load_model sets the tokenizer's; the class's own may lie outside its vocabulary
    # What is no whole number is the config class's to refuse, below.
    sizes = {key: value for key, value in fields.items() if isinstance(value, int)}
    hidden, heads = sizes.get("hidden_size"), sizes.get("num_attention_heads")
    if hidden and heads and hidden % heads and "head_dim" not in fields:
        raise UserError(f"model.config: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    key_value = sizes.get("num_key_value_heads")
    if heads and key_value and heads % key_value:
        raise UserError(
            f"model.config: num_attention_heads {heads} is not a multiple of num_key_value_heads {key_value}"
        )
    try:
        return config_class(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.config: {first_line(error)}") from error
    except StrictDataclassError as error:  # its first line names the field, its cause says what is wrong with it
        raise UserError(f"model.config: {first_line(error.__cause__ or error)}") from error


SIZES = ("_size", "_layers", "_heads", "_embeddings", "_dim", "_theta", "_eps")


def load_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None,
    run: RunFolder,
    auto_class: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """The model of the model section, as an `auto_class` (AutoModelForCausalLM by default).

    Weights are in `model.dtype` (float32: master weights; autocast computes in bf16). Raises UserError when both or
    neither of name and config are given, and when the tokenizer has ids that the model does not know.
    """
    import torch
    from transformers import AutoModelForCausalLM

    auto_class = auto_class or AutoModelForCausalLM
    if (model.name is None) == (model.config is None):
        raise UserError("model: give either name (pretrained) or config (from scratch), and not both")
    dtype = model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    if model.config is not None:
        config = fresh_config(model.config, len(tokenizer) if tokenizer is not None else None)
        if tokenizer is not None:
            config.bos_token_id, config.eos_token_id, config.pad_token_id = (
                tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
            )  # fmt: skip
        for key, value in options.items():
            setattr(config, key, value)
        try:
            large = run.dry and _parameters_of(auto_class, config) > LARGE
            with torch.device("meta" if large else "cpu"):
                made = auto_class.from_config(
                    config, dtype=torch.float32 if dtype == "auto" else dtype, attn_implementation=model.attention
                )
        except ImportError as error:
            raise UserError(f"model.attention: {first_line(error)}") from error
        except (KeyError, TypeError, ValueError) as error:  # an activation or a rotation that the library does not know
            raise UserError(f"model.config: no {config.model_type} can be made of it: {first_line(error)}") from error
    else:
        assert model.name is not None
        name = ensure_made(model.name, run)
        if is_adapter(name):
            raise UserError(
                f"model.name: {name} is an adapter, and no model without its base ({base_of(Path(name)) or 'unknown'}): give "
                "the merged model/ that the run left beside it, or the base"
            )
        made, loaded = _from_pretrained(
            "model", auto_class.from_pretrained, name, output_loading_info=True,
            revision=model.revision, dtype=dtype, attn_implementation=model.attention, **options,
        )  # fmt: skip
        _check_complete(made, loaded["missing_keys"], name, auto_class)
    if tokenizer is not None:
        rows = made.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: they do not belong together; "
                "give the model's own tokenizer (leave out model.tokenizer), or a model.config of that vocabulary"
            )
        if model.name and model.tokenizer and len(tokenizer) < rows and Path(model.name).exists():
            own = Path(model.name) / "tokenizer.json"
            other = Path(model.tokenizer) / "tokenizer.json"
            if own.exists() and other.exists() and own.read_bytes() != other.read_bytes():
                raise UserError(
                    f"{model.tokenizer} is not the tokenizer that {model.name} was trained with: leave out model.tokenizer"
                )
        settle_stops(made, tokenizer, run, fresh=model.name is None)
    _keep_tied_weights_together(made)
    return made


def refuse_quantised(model: Any) -> None:
    """Raise UserError for weights that were saved in few bits, of a model that is to learn and to be saved again."""
    if getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        raise UserError(
            f"model.name: {model.config._name_or_path} was saved quantised: what is learned could not be merged into it, since "
            "rounding the sum would lose it; give the full-precision weights (qlora quantises them itself)"
        )


def settle_stops(model: Any, tokenizer: PreTrainedTokenizerBase, run: RunFolder, *, fresh: bool = False) -> None:
    """Let the model name all tokens that end its answers, and the tokenizer's padding.

    A checkpoint may name more than its tokenizer does: Gemma's turns end in another token than its texts. A base model may have
    the chat template of its tuned kin (Qwen2.5's), and name the end of texts alone: the special token that ends a turn there joins.
    """
    from recipes.common.generation import stop_ids, turn_end

    if getattr(model, "generation_config", None) is not None:
        stops = [] if fresh else stop_ids(model, tokenizer)
        if stops and tokenizer.chat_template and not model.config.is_encoder_decoder:
            end, marks = turn_end(tokenizer)[0], tokenizer.added_tokens_decoder
            if end not in stops and end in marks and marks[end].special:
                stops.append(end)
                run.choose("stop token", f"{marks[end]} too", "the chat template ends the assistant's turn with it")
        model.generation_config.eos_token_id = stops if len(stops) > 1 else tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


# Classes whose head a recipe starts afresh on a checkpoint that has another one.
FRESH_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForPreTraining")


def _check_complete(made: Any, missing: set[str], name: str, auto_class: Any) -> None:
    """Raise UserError where a checkpoint lacks weights that transformers has filled with random numbers, or was not made to
    write (an encoder, a reward model) and is opened for it. A head that is new to the checkpoint may start afresh, and with it the pooler that feeds it (BERT's)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    architectures = list(getattr(made.config, "architectures", None) or [])
    kind = type(made).__name__
    holds = f"it holds a {', '.join(architectures)}" if architectures else "its config.json names no architectures"
    if auto_class.__name__.endswith(FRESH_HEADS) and kind not in architectures:
        backbone = f"{made.base_model_prefix}."
        missing = {key for key in missing if key.startswith(backbone) and ".pooler." not in key}
    parameters = {key for key, _ in made.named_parameters(remove_duplicate=False)}  # a buffer is computed, not learned
    if lacking := sorted(missing & parameters):
        shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise UserError(
            f"model: {name} lacks {len(lacking)} of the weights of a {kind}, which would be random numbers: {shown}; {holds}. "
            "Give a checkpoint of that kind, or fetch its files again"
        )
    if not auto_class.__name__.endswith(FRESH_HEADS) and any(name.endswith(FRESH_HEADS[:2]) for name in architectures):
        raise UserError(
            f"model: {name} scores or labels texts, {holds}: no recipe taught it to write; give what it was made of"
        )
    encoder = (
        made.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and getattr(made.config, "is_decoder", True) is False
    )
    if auto_class.__name__ == "AutoModelForCausalLM" and encoder:
        raise UserError(
            f"model: {name} is an encoder, {holds}: each word of it sees those to come, so it cannot learn to write them; give a "
            "decoder"
        )


def _keep_tied_weights_together(model: Any) -> None:
    """FSDP makes a unit of each module that a library's class names; one that holds the input embeddings, which are the
    output head too (BERT's), would take them away from the head."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if launched_with() == "FSDP":
        _share_no_parameter(model, table, head)
    holding = {type(module).__name__ for module in model.modules() if any(part is table for part in module.children())}
    model._no_split_modules = set(getattr(model, "_no_split_modules", None) or ()) - holding


def _share_no_parameter(model: Any, table: nn.Module, head: nn.Module | None) -> None:
    """FSDP wants a parameter in one unit. What an encoder and a decoder share with their table (BART's, T5's) becomes the same
    module; of the bias that BERT's head has under two names, the one that computes nothing goes (`whole_model` puts it back)."""
    for holder in list(model.modules()):
        for name, part in list(holder.named_children()):
            if type(part) is type(table) and part is not table and part.weight is table.weight:
                setattr(holder, name, table)
        bias = None if head is None or holder is head else getattr(head, "bias", None)
        for name, parameter in list(holder.named_parameters(recurse=False)):
            if parameter is bias:
                holder.register_parameter(name, None)


def _parameters_of(auto_class: Any, config: Any) -> int:
    """Parameters that a config would give, without memory for them."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in auto_class.from_config(config).parameters())


def extend_vocabulary(add: Callable[[Any], T], tokenizer: PreTrainedTokenizerBase, model: Model, run: RunFolder) -> T:
    """What `add(tokenizer)` gives: it puts in the tokens that an objective writes (masks, sentinels). Says which were missing.

    Raises UserError, with the way to add them, where the model is pretrained: it has no rows for new tokens.
    """
    before = set(tokenizer.get_vocab())
    marks = add(tokenizer)
    new = [token for token in tokenizer.get_added_vocab() if token not in before]
    shown = ", ".join(new if len(new) <= 4 else [*new[:2], "...", new[-1]])
    if new and model.name is not None:
        raise UserError(
            f"model.name: the tokenizer of {model.name} has no {shown}, which this objective writes, and the model no rows for "
            f"them. To add them: tokenizer.add_tokens({new[:3]}{' + ...' if len(new) > 3 else ''}, special_tokens=True), then "
            "model.resize_token_embeddings(len(tokenizer)); save both in a folder, and give that as model.name"
        )
    if new:
        run.say(f"  tokenizer: {shown} added, which the objective writes")
    return marks
