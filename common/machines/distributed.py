"""torchrun: one run in several processes, on one machine or many.

Every process holds the whole Rollout, whose [N, T] tensors are small beside a model, and derives the same advantages,
weights and normalisers from it: they are global without a word about it in a method's file. What costs time and memory
is dealt out and put together again: sampling by prompts, grading by rows, forward and backward passes by micro-batches.
Gradients are summed, never averaged, once before an optimizer step (copies) or at each backward pass (FSDP2's shards).
"""

import atexit
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.common.cli import Ended, System, UserError, launched, require

SHARDED: list[nn.Module] = []  # the models whose weights lie in shards


def start(system: System) -> None:
    """Join the processes that torchrun started, if it did. Only the first of them prints."""
    require(launched() or system.shard == "none", "--shard fsdp: start with torchrun --nproc-per-node N methods/...")
    require(not system.cpu_offload or system.shard == "fsdp", "--cpu-offload moves shards: add --shard fsdp")
    if launched() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # a slow rollout of one is no failure of all
        atexit.register(dist.destroy_process_group)
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def local_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if world() > 1 else "cuda"


def part(n: int) -> slice:
    """This process's share of n things in a row; all shares, in the order of ranks, are the whole."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def gather(things: list) -> list:
    """The lists of all processes as one, in the order of ranks."""
    if world() == 1:
        return things
    every: list = [None] * world()
    dist.all_gather_object(every, things)
    return list(itertools.chain(*every))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around what each process does alone: a UserError of any is raised by all, when all are here."""
    said = []
    try:
        yield
    except UserError as error:
        said = [str(error)]
    said = gather(said)
    if said:
        raise Ended(said[0])


def from_first(thing):
    """What the first process holds."""
    return gather([thing])[0]


def add_up(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sum over the processes, in place. Where each fills in its own rows of zeros, all get the whole."""
    for tensor in tensors if world() > 1 else ():
        dist.all_reduce(tensor)
    return tensors


def all_rows(x: Tensor) -> Tensor:
    """The rows of all processes in the order of ranks, the others' without gradient.  [n, ...] -> [sum of n, ...]

    A loss of all rows, computed by every process, then gives each the gradient of its own part of the graph.
    """
    if world() == 1:
        return x
    sizes = gather([len(x)])
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([x if r == rank() else rows[:n] for r, (rows, n) in enumerate(zip(parts, sizes, strict=True))])


def deal(batches: list[list[int]]) -> list[list[int]]:
    """This process's micro-batches, as many as any other's: the largest are split, into an empty one if need be."""
    for _ in range(-len(batches) % world()):
        batches.sort(key=len)
        *batches, last = batches
        batches += [last[: len(last) // 2], last[len(last) // 2 :]]
    return batches[rank() :: world()]


def sum_gradients(weights: list[nn.Parameter]) -> None:
    """Sum the gradients of weights that lie whole in each process. One that none has stays None: AdamW skips it."""
    weights = [weight for weight in weights if not hasattr(weight, "full_tensor")]
    if world() == 1 or not weights:
        return
    used = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    weights = [weight for weight, there in zip(weights, used.tolist(), strict=True) if there]
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    if weights:
        gradients = [weight.grad for weight in weights]
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)


def shard(model: nn.Module, layers: list[nn.Module], system: System, mixed: bool) -> None:
    """FSDP2: each layer's weights, and the rest of the model's, are gathered while they compute and not longer.

    mixed: computes in bfloat16; gradients are reduced in fp32. Sampling gathers the whole model for as long as it takes
    (see whole), so a model too large for that needs an engine of its own behind --rollout.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options = {"mesh": init_device_mesh(next(model.parameters()).device.type, (world(),))}
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if system.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for module in (*layers, model):
        fully_shard(module, **options)
        module.set_gradient_divide_factor(1.0)  # summed: the losses' normalisers are global
        module.set_force_sum_reduction_for_comms(True)
    # The head is applied in kernels/, after this returns: the root keeps its weights whole until the backward pass.
    model.backbone = lambda **inputs: model.base_model(**inputs).last_hidden_state
    register_fsdp_forward_method(model, "backbone")
    SHARDED.append(model)


def reshard() -> None:
    """Give back weights that scoring has left whole, before anything changes the shards."""
    for model in SHARDED:
        model.reshard()


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """The model's weights gathered, for processes that do not run in step, such as in sampling."""
    if not SHARDED:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.set_reshard_after_forward(module is not parts[0], recurse=False)
            module.reshard()
