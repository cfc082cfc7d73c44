"""One process of a torchrun job of tests/test_distributed.py: runs methods one after another in this process.

argv: folder for the runs, then a JSON list of [name, method, flags]. The first process stores a run's gradients before
clipping, summed over the processes, beside its metrics. Adam gets a large eps: it divides by the gradient's own size,
and so would turn rounding near 0 into whole steps. With 0.1, four updates of GRPO make of a gradient's rounding (5e-7,
as from other micro-batches in one process) 4e-6; with 0.01 they made 1.3e-5.
"""

import dataclasses
import importlib
import json
import os
import site
import sys
from pathlib import Path

import torch

site.addsitedir(str(Path(__file__).resolve().parents[1] / "methods"))
distributed, run, cli, training = (
    importlib.import_module(f"posttrain.common.{name}") for name in ("machines.distributed", "run", "cli", "training")
)
torch.set_num_threads(1)
run.plot = lambda *args: None  # half of a short run's time


class Linear(training.Optimizer):
    def __init__(self, *args):
        super().__init__(*args)
        self.adamw.param_groups[0]["eps"] = 1e-1


def main() -> None:
    root, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, method, flags in jobs:
        module, seen = importlib.import_module(f"posttrain.methods.{method}"), []
        module.Optimizer = Linear
        system = {
            key: flags.pop(key) for key in list(flags) if key in {f.name for f in dataclasses.fields(cli.Engines)}
        }
        kind = type(module.Config().system)
        config = module.Config(**flags, system=kind(**system), out=str(root / name))
        clip = torch.nn.utils.clip_grad_norm_

        def spy(weights, bound, seen=seen, clip=clip):
            whole = [None if w.grad is None else w.grad for w in weights]
            whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in whole]
            seen.append([None if g is None else g.clone() for g in whole])
            return clip(weights, bound)

        torch.nn.utils.clip_grad_norm_ = spy
        try:
            module.main(config)
        finally:
            torch.nn.utils.clip_grad_norm_ = clip
            distributed.SHARDED.clear()
        if distributed.rank() == 0:
            torch.save(seen, root / name / "gradients.pt")
        distributed.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
