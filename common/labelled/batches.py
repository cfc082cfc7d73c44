"""Labelled examples as batches of a model, and the logits that a model gives to what is to be predicted.

A table has `kind` (classify, seq2seq, causal), `names` of classes (none: a language model), `size(split)`,
`collate(split, indices, reader) -> Batch` and `describe(split, index) -> str`; splits are train and test.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from posttrain.common.machines import distributed
from posttrain.common.models import autocast, plain


@dataclass
class Reader:
    """How one model reads a table."""

    tokenizer: Any  # None: no text but features
    device: torch.device
    max_length: int = 0
    start: int = 0  # encoder-decoders: the token before the first of an answer


@dataclass
class Batch:
    """B examples with n predictions, in the order of examples and, within an answer, of tokens."""

    inputs: dict[str, Tensor]  # of the model, [B, ...]
    labels: Tensor  # [n], class or token
    owner: Tensor  # [n], the example of each prediction
    at: Tensor | None = None  # bool [B, T], language models: True at the n hidden states that predict
    cut: int = 0  # answers that max_length has shortened

    def mean(self, values: Tensor) -> Tensor:
        """[n] -> [B], over an example's predictions"""
        count = self.owner.bincount()
        return values.new_zeros(len(count)).index_add(0, self.owner, values) / count


def logits_of(model: nn.Module, batch: Batch, keep: Tensor | None = None) -> Tensor:
    """Logits of all n predictions or of those in keep [k], fp32 whatever the model's dtype.  -> [n or k, V]

    The head of a language model sees these rows only. What models do before it (T5's scale) and after it (BART's
    bias, Gemma's cap) is their own forward's: nothing but the head is replaced while it runs. Under torchrun each
    process reads its own examples, and gets the other rows without gradient (distributed.all_rows).
    """
    mine, head = distributed.part(len(next(iter(batch.inputs.values())))), plain(model).get_output_embeddings()
    few = mine.stop == mine.start  # fewer examples than processes: one reads the first for nothing
    inputs = {name: x[:1] if few else x[mine] for name, x in batch.inputs.items()}
    if batch.at is None:
        with autocast(model):
            logits = distributed.all_rows(model(**inputs).logits.float()[: mine.stop - mine.start])
        return logits if keep is None else logits[keep]
    first, n = int(batch.at[: mine.start].sum()), int(batch.at[mine].sum())
    at = batch.at[:1] & False if few else batch.at[mine]
    own = slice(None) if keep is None else keep[(keep >= first) & (keep < first + n)] - first

    def chosen_rows(hidden: Tensor) -> Tensor:
        rows, bias = hidden[at][own].float(), getattr(head, "bias", None)
        with torch.autocast(rows.device.type, enabled=False):  # bf16 logits would put 5e-2 nats of noise on a log-prob
            return linear(rows, head.weight.float(), None if bias is None else bias.float())

    head.forward = chosen_rows
    try:
        with autocast(model):
            return distributed.all_rows(model(**inputs, use_cache=False).logits.float())
    finally:
        del head.forward  # the class's own is back
