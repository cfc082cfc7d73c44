"""What --resume needs: a folder a step, by torch.distributed.checkpoint, each process writing the shards it holds.

It can be read by another number of processes, in shards or whole.
"""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from posttrain.common.machines import distributed

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: that is meant


def tensors(part: Any) -> dict[str, Any]:
    """A model's weights, those of adapters alone under LoRA, or an optimizer's moments by weight, as they lie here."""
    if isinstance(part, nn.Module):
        state, weights = states.get_model_state_dict(part), dict(part.named_parameters())
        tuned = {name for name, weight in weights.items() if weight.requires_grad}
        some = 0 < len(tuned) < len(weights)  # else all train, or none: an average of the policy
        return {name: x for name, x in state.items() if name in tuned} if some else state
    return states.get_optimizer_state_dict(part.model, part.adamw)


def save(folder: Path, step: int, plain: dict[str, Any], parts: dict[str, Any]) -> None:
    """plain: numbers and texts. A kill leaves the old folder or the new one: the rename is what counts."""
    partial, whole = folder / "partial", folder / f"step-{step:06d}"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        torch.save(plain, partial / "plain.pt")
    distributed.barrier()
    state = {name: tensors(part) for name, part in parts.items()}
    dcp.save(state, checkpoint_id=partial, no_dist=distributed.world() == 1)
    distributed.barrier()
    if distributed.rank() == 0:
        older = [path for path in folder.glob("step-*") if path != whole]
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)
        for path in older:
            shutil.rmtree(path)
    distributed.barrier()


def load(folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Load tensors into parts, a folder of save. -> its plain values. ValueError: what it holds is of something else"""
    plain = torch.load(folder / "plain.pt", map_location="cpu", weights_only=True)
    state = {name: tensors(part) for name, part in parts.items()}
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=distributed.world() == 1)
    except dcp.api.CheckpointException as error:  # no Exception
        raise ValueError(next(iter(error.failures.values()))[0]) from None
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            states.set_model_state_dict(part, state[name], options=states.StateDictOptions(strict=False))
        else:
            states.set_optimizer_state_dict(part.model, part.adamw, state[name])
    return plain


def read(folder: Path) -> dict[str, Any]:
    """All that the newest folder of checkpoint/ holds, tensors whole, for a look at it in one process."""
    newest = max(folder.glob("step-*"))
    with tempfile.TemporaryDirectory() as there:
        dcp_to_torch_save(newest, Path(there) / "all.pt")
        tensors = torch.load(Path(there) / "all.pt", weights_only=True)
    return torch.load(newest / "plain.pt", weights_only=True) | tensors
