"""Students and teachers for tables: classifiers, encoder-decoders, causal language models, and the digits' networks."""

import copy
from typing import Any

import torch
import transformers
from torch import nn

from posttrain.common.cli import require
from posttrain.common.labelled.batches import Reader
from posttrain.common.labelled.digits import Digits, make_mlp, trained_teacher
from posttrain.common.labelled.text import Answers, Classes
from posttrain.common.models import from_pretrained, load_model, load_tokenizer, plain, shared_vocabulary
from posttrain.common.tasks import parse_options

KINDS = {"classify": "SequenceClassification", "seq2seq": "Seq2SeqLM", "causal": "CausalLM"}


class BuiltIn:
    @staticmethod
    def from_pretrained(name: str, dtype: torch.dtype, **rest: Any) -> tuple[nn.Module, dict]:
        model = make_mlp([12]) if name == "digits-student" else copy.deepcopy(trained_teacher())
        return model.to(dtype), {"missing_keys": []}


def settings(name: str) -> tuple[Any, str]:
    config = from_pretrained(transformers.AutoConfig, name)
    return config, " ".join(config.architectures or ["nothing that its config names"])


def kind_of(name: str) -> str:
    config, made = settings(name)
    if "ForSequenceClassification" in made:
        return "classify"
    lm = config.is_encoder_decoder or "LMHead" in made or "CausalLM" in made
    require(lm, f"{name!r} is made for {made}: say what to train it as, --kind {', '.join(KINDS)}")
    return "seq2seq" if config.is_encoder_decoder else "causal"


def load_all(config: Any, kind: str, device: torch.device, same: bool) -> tuple:
    """Table, readers, student, teacher, and how many tokens both have where they must have the same (else None)."""
    name, _, options = config.task.partition(":")
    if name == "digits":
        given = parse_options("task 'digits'", [x for x in options.split(",") if x], ("noise", "rows"))
        table, readers = Digits(config.task, config.seed, **given), [Reader(None, device)] * 2
    else:
        lm, ours = kind != "classify", make_reader(config.model, kind, device, config.max_length)
        readers = [ours, ours if same and lm else make_reader(config.teacher, kind, device, config.max_length)]
        table = Answers(config.task, kind, config.prompt_column, config.answer_column, readers) if lm else Classes(
            config.task, config.text_column, config.text_pair_column, config.label_column
        )  # fmt: skip
    student = load(config.model, table, readers[0], config.dtype, config.lora_rank, train=True)
    teacher, width = load(config.teacher, table, readers[1], config.dtype), None
    if same and not table.names:
        width = shared_vocabulary(student, readers[0].tokenizer, teacher, load_tokenizer(config.teacher))
    return table, readers, student, teacher, width


def make_reader(name: str, kind: str, device: torch.device, max_length: int) -> Reader:
    start = getattr(settings(name)[0], "decoder_start_token_id", None)
    require(kind != "seq2seq" or start is not None, f"the config.json of {name!r} has no decoder_start_token_id")
    return Reader(load_tokenizer(name, ends=kind != "classify"), device, max_length, start or 0)


def load(name: str, table: Any, reader: Reader, dtype: str, lora_rank: int = 0, train: bool = False) -> nn.Module:
    """A student (train) or a frozen teacher. A student may get a new classification head, with the table's classes."""
    kind, names, fresh = getattr(transformers, f"AutoModelFor{KINDS[table.kind]}"), list(table.names), {}
    if reader.tokenizer is None and name in ("digits-student", "digits-teacher"):
        kind, fresh = BuiltIn, {"id2label": {}}
    elif names:
        config, made = settings(name)
        network = config.model_type == "posttrain_mlp"
        require(network == (reader.tokenizer is None), f"{name!r} ({made}) does not read what this --task holds")
        headed = network or "ForSequenceClassification" in made
        require(headed or train, f"teacher {name!r} has no trained classification head, it is made for {made}")
        if headed:
            same_classes(name, config.id2label, names)
        fresh = {"id2label": dict(enumerate(names)), "label2id": {x: i for i, x in enumerate(names)}}
    model = load_model(name, reader.device, dtype, lora_rank, train, kind, **(fresh if train else {}))
    if reader.tokenizer is not None and getattr(plain(model).config, "pad_token_id", None) is None:
        plain(model).config.pad_token_id = reader.tokenizer.pad_token_id
    return model if train else model.requires_grad_(False)


def same_classes(name: str, theirs: dict[int, str], names: list[str]) -> None:
    """The head's classes are the table's, in its order. Names are compared where both sides have any."""
    heads, wanted = ([x.casefold() for x in each] for each in (theirs.values(), names))
    require(len(heads) == len(names), f"{name!r} has {len(heads)} classes, the task {len(names)}: {', '.join(names)}")
    nameless = heads == [f"label_{i}" for i in range(len(heads))] or all(x.isdigit() for x in names)
    say = f"the classes of {name!r} are {', '.join(theirs.values())}, the task's {', '.join(names)}"
    require(nameless or heads == wanted, f"{say}: make id2label of its config.json the same")
