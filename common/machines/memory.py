"""--dry-run: the memory that a run will take on each process, before anything is loaded or written.

Models are built from their config alone, of tensors with shapes and no storage, and a forward pass of one micro-batch
goes through them: parameters, activations and key-value caches are counted where torch would allocate them, for any
architecture. At one time there are, beside what a model's copy on this process holds at rest (W weights, O moments):

    sample   W + O + the key-value cache of the rows that the engine has at a time + a step's logits
    score    W + O + one layer's work + a chunk of logits
    update   W + O + gradients + what autograd keeps of a micro-batch + a chunk of logits + the head's new gradient
    step     W + O + gradients + one copy of them where processes sum them, and in AdamW on a GPU

On top come the process itself (libraries, a CUDA context: about 0.5 GiB each) and what the allocator leaves unused.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.common.cli import UserError, first_line, require
from posttrain.common.models import add_lora, from_pretrained, plain
from posttrain.common.rollout import BATCH_TOKENS, check_rollout
from posttrain.kernels.head import chunk_rows

PROMPT = 256  # tokens of a prompt: tasks are not loaded either
FLOAT, GIB = 4, 2**30
PHASES = ("sample", "score", "update", "step")

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # one line of ours is enough


def causal_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options) -> tuple:
    """Flash attention, forced: torch would fall back to its plain form, [T, T] scores and all, on tensors of no device.

    Transformers builds no mask for a function that it does not know.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # as autocast does
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, True, scale=options.get("scaling"))[0].transpose(1, 2).contiguous(), None


def models_of(config: Any) -> dict[str, tuple[str, bool]]:
    """Part -> model, and whether it is kept as a model that trains, in fp32. Flags mean the same in all methods."""
    flags, parts = vars(config), {"policy": (config.model, True)}
    copies = config.lora_rank == 0  # else the policy's own base serves as its start, see load_start
    # Only where a reference can be refreshed is beta the weight of a KL to it.
    if copies and ((flags.get("beta") and "ref_every" in flags) or flags.get("reference") == "base"):
        parts["reference"] = (config.model, True)
    itself = flags.get("teacher", "self") == "self" and flags.get("teacher_sync", "live") != "live"
    if copies and (itself or flags.get("opsd_teacher", "current") != "current"):
        parts["teacher"] = (config.model, True)
    others = {"teacher": ("", "self"), "critic": ("", "task", "correctness", "self"), "summarizer": ("rules", "self")}
    for part, built_in in others.items():
        names = dict.fromkeys(name.rpartition("=")[2] for name in flags.get(part, built_in[0]).split(","))
        names = [name for name in names if name not in built_in and not name.startswith(("column:", "http:", "https:"))]
        parts |= {f"{part} {name}" if len(names) > 1 else part: (name, False) for name in names}
    return parts


def skeleton(name: str, dtype: str, lora_rank: int, as_trained: bool, sharded: bool = False) -> nn.Module:
    """load_model's model on the meta device, not frozen. UserError where there is none of this name."""
    settings = from_pretrained(transformers.AutoConfig, name)
    known = type(settings) in transformers.AutoModelForCausalLM._model_mapping
    require(known, f"{name!r} is no causal language model: its config says {settings.model_type}; choose another")
    transformers.AttentionInterface.register("dry_run", causal_attention)
    mixed = as_trained and dtype == "bfloat16"
    how = {"dtype": torch.float32 if mixed else getattr(torch, dtype), "attn_implementation": "dry_run"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, **how).eval()
        model = add_lora(model, lora_rank) if lora_rank else model
    model.autocast_dtype = torch.bfloat16 if mixed else None
    model.gathered_dtype = torch.bfloat16 if mixed and sharded else None  # FSDP gathers in what layers compute in
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def forward(model: nn.Module, rows: int, width: int, pack: Callable = lambda x: x, **options: Any) -> None:
    """The body on [rows, width] tokens, as on a CPU but without storage; pack sees what autograd keeps, no weights."""
    body, dtype, gathered = plain(model).base_model, model.autocast_dtype, model.gathered_dtype
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        new = lambda x, dtype=None: torch.empty(x.shape, dtype=dtype or x.dtype).requires_grad_(x.requires_grad)  # noqa: E731
        state = {name: new(x, gathered) for name, x in body.named_parameters()}
        state |= {name: new(x) for name, x in body.named_buffers()}
        weights = {x.untyped_storage()._cdata for x in state.values()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: x if x.untyped_storage()._cdata in weights else pack(x), lambda x: x
        ):
            try:
                torch.func.functional_call(body, state, torch.zeros(rows, width, dtype=torch.int64), options)
            except Exception as error:  # of many types: its code looks at values, which these tensors lack
                raise UserError(f"--dry-run cannot follow {type(body).__name__} ({first_line(error)})") from None


def activations(model: nn.Module, rows: int, width: int, checkpointing: bool = False) -> tuple[int, int]:
    """Bytes that autograd keeps of [rows, width] tokens for the backward pass, and those of the largest layer."""
    kept, sizes, inputs, place = {}, Counter(), {}, ["rest"]

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in kept:  # kept holds it, so that no other takes its address
            kept[storage._cdata] = storage
            sizes[place[0]] += storage.nbytes()
        return x

    def enter(layer: nn.Module, args: tuple) -> None:
        place[0], inputs[layer] = layer, args[0].nbytes

    def leave(*_: Any) -> None:
        place[0] = "rest"

    hooks = [h for m in layers_of(model) for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]
    forward(model, rows, width, pack, use_cache=False)
    for hook in hooks:
        hook.remove()
    rest = sizes.pop("rest", 0)
    largest = max(sizes.values(), default=0)
    return rest + (sum(inputs.values()) + largest if checkpointing else sizes.total()), largest


@torch.no_grad()
def cache_bytes(model: nn.Module, rows: int, width: int) -> int:
    """Keys and values of [rows, width] tokens."""
    cache = transformers.DynamicCache(config=model.config)
    forward(model, rows, width, past_key_values=cache, use_cache=True)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def at_rest(model: nn.Module, shards: int = 0) -> dict[str, int]:
    """Numbers of parameters (tied ones once), and bytes of them on a process, their gradients' and AdamW's moments'.

    gathered: what FSDP has whole at one time, the largest layer and what is outside of layers; whole: all of it.
    """
    weights, layers = list(model.parameters()), [list(layer.parameters()) for layer in layers_of(model)]
    size = lambda ps: sum(p.numel() * (model.gathered_dtype or p.dtype).itemsize for p in ps)  # noqa: E731
    trained, within = sum(p.numel() for p in weights if p.requires_grad), [size(layer) for layer in layers]
    gathered = {"gathered": size(weights) - sum(within) + max(within, default=0), "whole": size(weights)}
    share = {"weights": sum(p.nbytes for p in weights), "gradients": FLOAT * trained, "moments": 2 * FLOAT * trained}
    counts = {"parameters": sum(p.numel() for p in weights), "trained": trained}
    counts |= gathered if shards else dict.fromkeys(gathered, 0)
    return counts | {name: -(-size // max(1, shards)) for name, size in share.items()}


def rows_at_once(prompts: int, group: int, longest: int) -> int:
    """Of HFEngine.generate, which answers as many prompts at a time as BATCH_TOKENS allow."""
    return min(prompts, max(1, BATCH_TOKENS // (group * longest))) * group


def estimate(config: Any) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """What each model holds at rest on one process, and part -> phase -> bytes of a step. UserError: no such model."""
    system, n, bf16 = config.system, config.system.processes, config.dtype == "bfloat16"
    sharded = system.shard == "fsdp"
    gpu = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    longest, prompts = PROMPT + config.max_new_tokens, -(-config.prompts_per_step // n)
    rows = prompts * config.group_size  # of this process
    batch = min(rows, max(1, config.micro_batch_tokens // longest))  # rows of a micro-batch
    models: dict[str, dict[str, int]] = {}
    parts: dict[str, Counter] = defaultdict(Counter)
    for role, (name, as_trained) in models_of(config).items():
        trains = role == "policy"
        model = skeleton(name, config.dtype, config.lora_rank if trains else 0, as_trained, sharded)
        head = plain(model).get_output_embeddings().weight  # [V, H]
        kept, layer = activations(model, batch, longest, system.checkpointing)
        held = models[role] = at_rest(model if trains else model.requires_grad_(False), n * sharded)
        for key in ("weights", "moments"):
            parts[f"{role}: {key}"] = Counter(dict.fromkeys(PHASES, held[key]))
        chunk = min(chunk_rows(len(head), "cuda" if gpu else "cpu"), batch * longest) * len(head)
        logits = chunk * (FLOAT + 2 * (bf16 and gpu)) + 2 * head.numel() * (
            bf16 and as_trained and not sharded
        )  # and W's copy
        parts["activations"] |= {"score": layer}  # the larger of these and of other models'
        parts["logits"] |= {"score": logits}
        parts["gathered by FSDP"] |= {"score": held["gathered"]}
        if not trains:
            continue
        parts["activations"]["update"], parts["logits"]["update"] = kept, logits
        parts["head's new gradient"]["update"] = FLOAT * head.numel() * head.requires_grad  # before it is added
        parts["gradients"] |= dict.fromkeys(("update", "step"), held["gradients"])
        # Gradients are summed over the processes in one tensor; on a GPU AdamW has as much for a moment.
        parts["copy of gradients"]["step"] = held["gradients"] * (gpu or (n > 1 and not sharded))
        parts["gathered by FSDP"] |= {"update": 2 * held["gathered"]}  # and its gradients
        if config.rollout == "hf":
            tested = rows_at_once(-(-config.eval_problems // n), config.eval_samples, longest)
            played = max(tested, rows_at_once(prompts, config.group_size, longest))
            parts["key-value cache"]["sample"] = cache_bytes(model, played, longest)
            parts["gathered by FSDP"]["sample"] = held["whole"]  # see distributed.whole
            parts["logits"]["sample"] = 4 * FLOAT * played * len(head)  # and log-probs, probabilities, their sums
    parts["rollout"] = Counter(
        dict.fromkeys(PHASES, n * rows * longest * (2 * 8 + 8 * FLOAT))
    )  # everywhere; int64, fp32
    return models, parts


def report(config: Any) -> None:
    """Prints the estimate. UserError where a flag names no model."""
    if not hasattr(config, "rollout") or not hasattr(config, "prompts_per_step"):
        print("--dry-run: no estimate here, where no policy that samples text is trained")
        return
    check_rollout(config.rollout)
    (models, parts), system = estimate(config), config.system
    waiting = {}
    if system.cpu_offload and system.shard == "fsdp":
        waiting = {part: parts.pop(part) for part in list(parts) if ":" in part or part == "gradients"}
    for role, held in models.items():
        print(f"{role}: {held['parameters']:,} parameters, of which {held['trained']:,} train")
    table = Table(title=f"GiB on each of {system.processes} processes", title_justify="left")
    for column in ("", *PHASES):
        table.add_column(column, justify="right" if column else "left")
    for part, sizes in parts.items():
        if any(sizes.values()):
            table.add_row(part, *(f"{sizes[phase] / GIB:.3f}" if sizes[phase] else "" for phase in PHASES))
    together = {phase: sum(sizes[phase] for sizes in parts.values()) for phase in PHASES}
    table.add_section()
    table.add_row("together", *(f"{together[phase] / GIB:.3f}" for phase in PHASES))
    Console(highlight=False).print(table)
    peak = max(PHASES, key=together.get)
    largest = max(parts, key=lambda part: parts[part][peak])
    share, all_processes = parts[largest][peak] / together[peak], together[peak] * system.processes / GIB
    print(f"Peak in {peak}: {together[peak] / GIB:.3f} GiB a process, {all_processes:.3f} GiB in all")
    print(f"Largest part: {largest}, {share:.0%}. Prompts are taken as {PROMPT} tokens")
    if waiting:
        print(f"In CPU memory wait {sum(sizes['step'] for sizes in waiting.values()) / GIB:.3f} GiB a process")
    if config.rollout == "vllm":
        when = "in sample alone" if system.vllm_sleep else "in all phases"
        print(f"vLLM takes {system.vllm_memory:.0%} of each GPU on top, {when}")
