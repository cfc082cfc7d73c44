"""A model's weights out of it: as a folder, and one by one for an engine, whatever its adapters and shards."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from posttrain.common.machines import distributed
from posttrain.common.models import plain


def save_model(model: nn.Module, tokenizer: "transformers.PreTrainedTokenizerBase | None", folder: Path) -> None:
    """Plain Hugging Face folder, written beside the target and renamed into place. Adapters are merged for good."""
    partial, sharded = folder.with_name(folder.name + ".partial"), plain(model) in distributed.SHARDED
    # Gathering is collective; only the first process keeps what is gathered.
    weights = (
        {name: weight.cpu().clone() for name, weight in full_weights(model) if not distributed.rank()}
        if sharded
        else {}
    )
    if distributed.rank() == 0:
        if sharded:
            from huggingface_hub import save_torch_state_dict

            partial.mkdir(exist_ok=True)
            save_torch_state_dict(weights, partial)
            plain(model).config.save_pretrained(partial)
            if plain(model).can_generate():
                plain(model).generation_config.save_pretrained(partial)
        else:
            model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
            model.save_pretrained(partial)
        if tokenizer:
            tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    distributed.barrier()


@torch.no_grad()
def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight as a checkpoint on disk holds them, for an engine with a copy of its own.

    Adapters are merged and shards (FSDP2) gathered one weight at a time, the model stays as it is; every rank must
    iterate, for gathering is collective. Tied weights come once. A tensor may be the policy's own: copy, never write.
    """
    from transformers.core_model_loading import revert_weight_conversion

    policy = plain(model)
    adapted = {name: layer for name, layer in policy.named_modules() if hasattr(layer, "get_delta_weight")}

    def whole(name: str, weight: Tensor) -> Tensor:
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        for adapter in layer.active_adapters if layer and name.endswith(".base_layer.weight") else ():
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        if hasattr(weight, "full_tensor"):  # what waits on the CPU is gathered on the device of its mesh
            weight = weight.to(weight.device_mesh.device_type).full_tensor()
        return weight.detach()

    tied, tuned = policy.all_tied_weights_keys, (".lora_A.", ".lora_B.")  # lm_head.weight -> model.embed_tokens.weight
    held = [(k, v) for k, v in policy.state_dict().items() if k not in tied and not any(mark in k for mark in tuned)]
    for _, layer in itertools.groupby(held, lambda each: next(filter(str.isdigit, each[0].split(".")), "")):
        named = {name.replace(".base_layer.", "."): whole(name, weight) for name, weight in layer}
        # transformers fuses some weights while loading, such as the experts of a layer
        yield from revert_weight_conversion(policy, named).items()
