"""Handwritten digits, 8 x 8 pixels, of scikit-learn: the embedded default of methods that learn from labels.

1,797 images, 600 of them held out. A teacher has all others, a student some `rows` with a share `noise` of labels drawn
anew; this choice alone depends on the seed.
"""

import functools

import torch
from torch import Tensor, nn

from posttrain.common.cli import require
from posttrain.common.labelled.batches import Batch, Reader
from posttrain.common.labelled.mlp import MLP, MLPConfig
from posttrain.common.rollout import seed_of

HELDOUT, NAMES = 600, [str(i) for i in range(10)]


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Pixels [1797, 64] in [0, 1] and digits [1797], shuffled once for good."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]


def make_mlp(hidden: list[int]) -> MLP:
    return MLP(MLPConfig(hidden_sizes=hidden, id2label=dict(enumerate(NAMES)))).eval()


@functools.cache
def trained_teacher() -> MLP:
    """64-256-256-10, 30 epochs over all that is not held out; the same in every run, whatever its seed."""
    x, y = (t[HELDOUT:] for t in images())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = make_mlp([256, 256])
        adamw = torch.optim.AdamW(teacher.parameters(), 1e-3)
        for _ in range(30):
            for rows in torch.randperm(len(x)).split(32):
                adamw.zero_grad()
                nn.functional.cross_entropy(teacher(x[rows]).logits, y[rows]).backward()
                adamw.step()
    return teacher


class Digits:
    kind, names = "classify", NAMES

    def __init__(self, name: str, seed: int, *, noise: float = 0.4, rows: int = 600):
        (x, y), most = images(), len(images()[1]) - HELDOUT
        known = type(noise) in (int, float) and 0 <= noise <= 1 and type(rows) is int and 0 < rows <= most
        require(known, f"task {name!r}: noise is a share in [0, 1], rows a number from 1 to {most}")
        draw = torch.Generator().manual_seed(seed_of(seed, 2**31 + 2))
        chosen = HELDOUT + torch.randperm(most, generator=draw)[:rows]
        given, redrawn = y[chosen].clone(), torch.randperm(rows, generator=draw)[: round(noise * rows)]
        given[redrawn] = torch.randint(10, (len(redrawn),), generator=draw)
        self.splits = {"train": (x[chosen], given), "test": (x[:HELDOUT], y[:HELDOUT])}

    def size(self, split: str) -> int:
        return len(self.splits[split][1])

    def collate(self, split: str, rows: list[int], reader: Reader) -> Batch:
        x, y = (t[rows].to(reader.device) for t in self.splits[split])
        return Batch({"features": x}, y, torch.arange(len(rows), device=reader.device))

    def describe(self, split: str, row: int) -> str:
        shades = (self.splits[split][0][row].view(8, 8) * 9.99).int().tolist()
        return "\n".join("".join(" .:-=+*#%@"[shade] for shade in line) for line in shades)
