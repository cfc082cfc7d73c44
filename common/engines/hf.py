"""Sampling with the trainer's own model through transformers (--rollout hf)."""

import contextlib
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor

from posttrain.common.machines import distributed
from posttrain.common.models import autocast, device_of, plain
from posttrain.common.rollout import Engine, Sampling


def sample_tokens(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at u.  [R, V], [R] in [0, 1) -> ids [R], logps [R]

    One uniform number a row and step makes a row's sample independent of the rows batched with it.
    """
    logps = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        ids = logps.argmax(-1)
    else:
        probs = logps.exp()
        if top_p < 1:  # keep the likeliest tokens until their mass reaches top_p
            ordered, order = probs.sort(-1, descending=True)
            dropped = ordered.cumsum(-1) - ordered >= top_p
            probs = probs.masked_fill(dropped.scatter(-1, order, dropped), 0)
        cdf = probs.cumsum(-1)
        total = cdf[:, -1]
        target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
        ids = torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)  # right: never a token of mass 0
    return ids, logps.gather(-1, ids[:, None]).squeeze(-1)


class Memory:
    """Keys and values of contexts that a later call goes on with; empty at first."""

    cache: "transformers.DynamicCache | None" = None
    mask: Tensor | None = None  # [R, S] int64, 1 on slots that hold a token of their row

    def keep(self, rows: list[int]) -> None:
        if self.cache is None:
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]


class HFEngine(Engine):
    """Samples with the trainer's own model through transformers: works everywhere, never has stale weights."""

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        with distributed.whole(self.model):  # the processes' batches do not run in step
            yield

    @torch.no_grad()
    def complete(self, contexts: list, u: Tensor, sampling: Sampling, stops=(), limits=(), memory=None) -> tuple:
        model, device = plain(self.model), device_of(self.model)
        u, limits = u.to(device), torch.tensor(limits or [u.shape[1]] * len(u), device=device)
        ends = torch.tensor(self.stop_ids, device=device)
        stop = transformers.StopStringCriteria(self.tokenizer, list(stops)) if stops else None

        def forward(tokens: Tensor, mask: Tensor, position: Tensor, cache: "transformers.DynamicCache") -> Tensor:
            with autocast(self.model):
                inputs = {"input_ids": tokens, "position_ids": position, "attention_mask": mask if padded else None}
                return model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

        if memory and memory.cache:
            known, cache = memory.mask, memory.cache
            new = [context[k:] for context, k in zip(contexts, known.sum(1).tolist(), strict=True)]
        else:  # every prompt is read once and its cache repeated for the group
            place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, contexts)))}
            new, cache = list(map(list, place)), transformers.DynamicCache(config=model.config)
            known = torch.zeros(len(new), 0, dtype=torch.int64, device=device)
        width = max(map(len, new))
        tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in new], device=device)  # left-padded
        lengths = torch.tensor([len(ids) for ids in new], device=device)
        mask = torch.cat([known, (torch.arange(width, device=device) >= width - lengths[:, None]).long()], 1)
        padded = memory is not None or bool((mask == 0).any())
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        logits, position = forward(tokens, mask, position, cache), position[:, -1:] + 1
        if len(new) < len(contexts):
            index = torch.tensor([place[tuple(context)] for context in contexts], device=device)
            cache.batch_select_indices(index)
            logits, mask, position = logits[index], mask[index], position[index]
        rows = torch.arange(len(contexts), device=device)  # which row each line of the shrinking batch is
        alive = torch.ones_like(rows, dtype=torch.bool)
        ids = torch.full((len(rows), int(limits.max())), -1, device=device)
        logps = torch.zeros(ids.shape, device=device)
        for t in range(ids.shape[1]):
            token, logp = sample_tokens(logits, u[rows, t], sampling.temperature, sampling.top_p)
            ids[rows, t] = torch.where(alive, token, -1)
            logps[rows, t] = logp
            alive = alive & ~torch.isin(token, ends) & (t + 1 < limits[rows])
            if stop:
                alive = alive & ~stop(ids[rows, : t + 1].clamp(min=0), None)
            if t + 1 == ids.shape[1]:
                break
            if device.type == "cpu" or t % 8 == 7:  # looking at `alive` waits for a GPU: not at every step
                left = int(alive.sum())
                if left == 0:
                    break
                if left <= 0.75 * len(rows) and memory is None:  # drop finished rows and their cache
                    kept = alive.nonzero().squeeze(1)
                    cache.batch_select_indices(kept)
                    rows, token, alive, mask, position = (x[kept] for x in (rows, token, alive, mask, position))
            if padded:  # a row's last token is not remembered: the next call reads it with what follows
                mask = torch.cat([mask, alive[:, None].long()], 1)
            logits = forward(token[:, None], mask, position, cache)
            position = position + 1
        lengths = (ids >= 0).sum(1).tolist()
        ids, logps = ([row[:k] for row, k in zip(rows.tolist(), lengths, strict=True)] for rows in (ids, logps))
        if memory is not None:
            memory.cache, memory.mask = cache, mask
        return ids, logps
