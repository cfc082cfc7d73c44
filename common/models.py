"""Policies and teachers: any causal language model of transformers, from a folder, the hub or the tiny ones here."""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
import transformers.utils  # classes are imported when first named: that takes seconds, which --help need not wait
from torch import nn

from posttrain.common.cli import System, UserError, first_line, launched, require
from posttrain.common.machines import distributed

transformers.utils.is_sklearn_available = lambda: False  # assisted generation's; it would take a second of every start

SYSTEM = System()  # the run's, from prepare: how load_model lays out what it loads
TINY = Path(__file__).parent / "tiny"  # trained by scripts/pretrain_tiny.py
ONLY_AT_1 = "a teacher on a server gives log-probs at temperature 1 only; let all temperatures be 1"

transformers.utils.logging.set_verbosity_error()
logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it reports every retry; one line of ours is enough
transformers.utils.logging.disable_progress_bar()


def prepare(config: Any, tiny: bool = False) -> torch.device:
    """Processes, seeds, CPU threads and device. One thread for the tiny models: two can be twenty times slower.

    tiny: the model is, whatever its name. With --dry-run it ends here, before anything is loaded or written.
    """
    global SYSTEM
    SYSTEM = getattr(config, "system", SYSTEM)
    if SYSTEM.dry_run:
        from posttrain.common.machines.memory import report

        if not launched() or os.environ["RANK"] == "0":
            report(config)
        raise SystemExit(0)
    heats = [getattr(config, name, 1) for name in ("temperature", "divergence_temperature")]
    require(set(heats) == {1} or "://" not in getattr(config, "teacher", ""), ONLY_AT_1)
    distributed.start(SYSTEM)
    transformers.set_seed(config.seed)
    threads = getattr(config, "threads", SYSTEM.threads)
    if threads or tiny or (TINY / config.model).is_dir():
        torch.set_num_threads(threads or 1)
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        name = auto if config.device == "auto" else config.device
        own = f"--device {name}: under torchrun each process takes a GPU of its own; give --device cuda"
        require(distributed.world() == 1 or ":" not in name, own)
        return torch.empty(0, device=distributed.local_device() if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {config.device!r} here ({first_line(error)}); try --device cpu") from None


def from_pretrained(kind: Any, name: str, **kwargs: Any) -> Any:
    """kind.from_pretrained, whose failures become one line."""
    where = str(TINY / name) if (TINY / name).is_dir() else name
    try:
        return kind.from_pretrained(where, **kwargs)
    except Exception as error:  # of many types: no such name, no network, no or broken or foreign files
        built_in = ", ".join(sorted(path.parent.name for path in TINY.glob("*/config.json")))
        known = f"not one of the built-in {built_in}, nor a Hugging Face folder, nor a name that the hub answers for"
        require(not os.path.exists(where), f"cannot load {name!r} ({first_line(error)}); mend it or choose another")
        raise UserError(f"cannot load {name!r}: {known} ({first_line(error)})") from None


def load_tokenizer(name: str, ends: bool = True) -> "transformers.PreTrainedTokenizerBase":
    """ends: refuse one without an end of text. For a model on a server, the tokenizer of what it serves."""
    if name.startswith(("http://", "https://")):
        from posttrain.common.engines.teacher import served

        name = served(name)["root"]
    tokenizer = from_pretrained(transformers.AutoTokenizer, name)
    has = tokenizer.eos_token_id is not None or (not ends and tokenizer.pad_token_id is not None)
    require(has, f"the tokenizer of {name!r} has no eos_token; set it in its folder")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # only fills; masks come from lengths, not ids
    return tokenizer


def load_model(
    name: str, device: torch.device, dtype: str = "float32", lora_rank: int = 0, train: bool = True,
    kind: Any = None, **fresh: Any
) -> nn.Module:  # fmt: skip
    """A causal language model, or kind, in eval mode: no dropout in training either, else on-policy ratios are not 1.
    fresh: settings of a classification head, which may then be new; without them all weights must be there.

    A trained model keeps fp32 weights whatever the dtype (steps of 1e-6 vanish in bf16); with dtype bfloat16 it
    computes under autocast. A frozen model is held in dtype itself. With lora_rank > 0 only adapters train.
    """
    mixed = train and dtype == "bfloat16"
    options = {"dtype": torch.float32 if mixed else getattr(torch, dtype), "output_loading_info": True, **fresh}
    if name.startswith(("http://", "https://")):
        from posttrain.common.engines.teacher import ServerModel

        require(not train, f"{name!r} is on a server and cannot train here: give --model a folder or hub name")
        return ServerModel(name, device, getattr(SYSTEM, "teacher_cache", ""))
    model, found = from_pretrained(kind or transformers.AutoModelForCausalLM, name, **options)
    lacks = f"{name!r} lacks weights of a {type(model).__name__}: {', '.join(sorted(found['missing_keys'])[:3])}"
    require(fresh or not found["missing_keys"], f"{lacks}; choose a model with this head")
    model = model.to(device).eval().requires_grad_(train)
    model = add_lora(model, lora_rank, "SEQ_CLS" if fresh else None) if lora_rank and train else model
    model.autocast_dtype = torch.bfloat16 if mixed else None
    layers = [layer for layer in model.modules() if isinstance(layer, transformers.GradientCheckpointingLayer)]
    for layer in layers if SYSTEM.checkpointing and train else ():
        layer.forward = partial(recomputed, layer.forward)
    plain(model).computes_on = device
    if SYSTEM.shard == "fsdp":
        distributed.shard(plain(model), layers, SYSTEM, mixed)
    model.weights_version = 0  # raised with every change, so that an engine with a copy of its own knows
    return model


def add_lora(model: nn.Module, rank: int, task: str | None = None) -> nn.Module:
    """Adapters on all linear layers train, and of a SEQ_CLS model the head as it is; the rest is frozen."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)
    return get_peft_model(model, lora).eval()


def recomputed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward, whose activations are made again in the backward pass. transformers' own switch acts in train
    mode alone, in which models have dropout."""
    if torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)


def load_start(policy: nn.Module, name: str, device: torch.device, dtype: str = "float32") -> nn.Module:
    """The weights `name` that the policy started from, frozen: its own base under the adapters, without any memory;
    else a second copy, in the policy's precision."""
    if not hasattr(policy, "disable_adapter"):
        return load_model(name, device, dtype).requires_grad_(False)
    base = copy.copy(policy)  # the same modules
    base.without_adapters = True
    return base


def plain(model: nn.Module) -> nn.Module:
    """The transformers model itself, adapters in place, out of peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes; its weights may wait elsewhere (--cpu-offload)."""
    return getattr(plain(model), "computes_on", None) or plain(model).device


@contextlib.contextmanager
def autocast(model: nn.Module) -> Iterator[None]:
    """The context in which a model from load_model or load_start computes."""
    dtype, bare = model.autocast_dtype, getattr(model, "without_adapters", False)
    computes = torch.autocast(device_of(model).type, dtype, enabled=dtype is not None)
    with computes, model.disable_adapter() if bare else contextlib.nullcontext():
        yield


def stop_ids(model: nn.Module, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Every token that ends a response: the tokenizer's and all of the generation config's (Qwen3 has two)."""
    ids = plain(model).generation_config.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})


def shared_vocabulary(student: nn.Module, student_tokenizer, teacher: nn.Module, teacher_tokenizer) -> int:
    """The number of leading ids that mean the same to both models. Raises UserError when their tokenizers differ.

    Heads of one family may be padded to different sizes (Qwen2.5-3B 151,936, 72B 152,064).
    """
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token = next(t for t in sorted(ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t))
        sizes = f"{len(ours)} and {len(theirs)} tokens, first difference {token!r}"
        raise UserError(f"student and teacher have different vocabularies ({sizes}): choose models of one family")
    return min(plain(m).get_output_embeddings().weight.shape[0] for m in (student, teacher))
