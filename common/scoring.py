"""Log-probs, entropies and divergences of a Rollout under a model, on its sampled tokens only.

Hidden states come from the transformers backbone; the LM head is applied in `kernels/`, which never hold
[tokens, vocabulary] for more than one chunk. Every [N, T] result lines up with the rollout's masks.
"""

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from posttrain.common.cli import require
from posttrain.common.machines import distributed
from posttrain.common.models import autocast, plain
from posttrain.common.rollout import Rollout
from posttrain.kernels.logprob import linear_token_logp

ONLY_LOGPS = "a teacher on a server gives log-probs of tokens only; choose an estimator that needs no more"


def lm_head(model: nn.Module) -> dict[str, Any]:
    """The LM head as arguments of `kernels/`: weight [V, H], bias [V] or None, softcap or None (Gemma-2)."""
    require(not hasattr(model, "urls"), ONLY_LOGPS)
    head, dtype = plain(model).get_output_embeddings(), getattr(model, "autocast_dtype", None)
    weight = head.weight.to(dtype or head.weight.dtype)  # as autocast would; the logits are fp32 all the same
    softcap = getattr(plain(model).config.get_text_config(), "final_logit_softcapping", None)
    return {"weight": weight, "bias": getattr(head, "bias", None), "softcap": softcap}


def sampled_hidden(model: nn.Module, rollout: Rollout, share: bool = False, **inputs: Any) -> Tensor:
    """The hidden state that predicts each sampled token, row after row.  -> [n, H], n = loss_mask.sum()

    Two rollouts that hold the same responses under different prompts give rows in the same order.
    share: read a prompt that several rows have once, see shared_body; else it is read for each of them.
    inputs: what a multimodal model takes for these rows besides tokens, such as pixel_values.
    """
    tokens, sampled = rollout.tokens.new_zeros(1, 1), rollout.loss_mask.new_zeros(1, 1).bool()  # no rows: [0, H]
    require(not hasattr(model, "urls"), ONLY_LOGPS)
    if len(rollout):
        width = int(rollout.attention_mask.sum(1).max())  # the shared width may be padding for these rows
        tokens, sampled = rollout.tokens[:, :width], rollout.loss_mask[:, :width].bool()
    network = getattr(plain(model), "backbone", None)  # FSDP2's, see distributed.shard
    with autocast(model):
        if share and len(rollout):
            hidden, sampled = shared_body(model, tokens, sampled, rollout.attention_mask.sum(1).long())
        # Else padding is on the right and attention is causal, so no real token sees it: no mask, the fast path.
        elif network:
            hidden = network(input_ids=tokens, use_cache=False, **inputs)
        else:
            hidden = plain(model).base_model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state
    hidden = hidden[:, :-1][sampled[:, 1:]]  # the only shift in the project: position t-1 predicts token t
    config = plain(model).config.get_text_config()  # Cohere multiplies its logits, Granite divides them
    hidden = hidden * (getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
    return hidden.to(getattr(model, "autocast_dtype", None) or hidden.dtype)


def shared_body(model: nn.Module, tokens: Tensor, sampled: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states from each row's last prompt token on, and `sampled` there.  -> [R, S, H], bool [R, S]

    Every different prompt goes through the body once; the rows go on from its keys and values, and their gradients meet
    there. G responses of S tokens to a prompt of P cost P + G S tokens, not G (P + S). Sums are rounded otherwise.
    tokens [R, T]; sampled bool [R, T]; lengths [R]. UserError: a model whose layers keep less than all keys and values
    """
    config = plain(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    unfit = f"layers of {type(plain(model)).__name__} are {', '.join(sorted(kinds))}: leave --share-prompts away"
    require(kinds == {"full_attention"} and not getattr(config, "sliding_window", None), unfit)
    last = (sampled.int().argmax(1) - 1).clamp(min=0)  # [R], of the prompt; it is read with the response
    width, known = tokens.shape[1], int(last.max())
    prompts = tokens[:, :known].masked_fill(torch.arange(known, device=tokens.device) >= last[:, None], -1)
    prompts, which = prompts.unique(dim=0, return_inverse=True)  # [P, known], -1 behind a prompt's end; [R]
    cache = transformers.DynamicCache(config=plain(model).config)
    if known:
        plain(model).base_model(input_ids=prompts.clamp(min=0), past_key_values=cache, use_cache=True)
        cache.batch_select_indices(which)
    position = last[:, None] + torch.arange(int((lengths - last).max()), device=tokens.device)  # [R, S]
    inside = position.clamp(max=width - 1)  # beyond: padding
    mask = torch.cat([(prompts[which] >= 0).long(), torch.ones_like(position)], 1)  # [R, known + S]
    inputs = {"input_ids": tokens.gather(1, inside), "position_ids": position, "past_key_values": cache}
    inputs["attention_mask"] = None if bool((last == known).all()) else mask
    hidden = plain(model).base_model(**inputs, use_cache=True).last_hidden_state
    return hidden, sampled.gather(1, inside) & (position < width)


def scatter(values: Tensor, rollout: Rollout) -> Tensor:
    """One value per sampled token back to its place, 0 elsewhere.  [n] -> [N, T]"""
    out = torch.zeros(rollout.tokens.shape, dtype=values.dtype, device=values.device)
    return out.masked_scatter(rollout.loss_mask.bool(), values)


def token_logps(
    model: nn.Module, rollout: Rollout, temperature: float = 1.0, vocab_size: int | None = None,
    hidden: Tensor | None = None, share: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logps [N, T] and entropy [N, T] (nats) of the sampled tokens, with gradient, 0 elsewhere.

    temperature divides the logits, as it did in sampling; hidden = sampled_hidden if at hand; share as there.
    """
    hidden = sampled_hidden(model, rollout, share) if hidden is None else hidden
    ids = rollout.tokens[rollout.loss_mask.bool()]
    found = linear_token_logp(hidden, ids=ids, temperature=temperature, vocab_size=vocab_size, **lm_head(model))
    return scatter(found[0], rollout), scatter(found[1], rollout)


def micro_batches(rollout: Rollout, max_tokens: int, share: bool = False) -> list[Tensor]:
    """Rows [n] int64 of similar length whose padded size stays within max_tokens; every row once, in one process.

    share: the rows of a group stay together, whether their lengths differ or not.
    """
    lengths = rollout.attention_mask.sum(1).long()
    order, lengths = lengths.argsort(stable=True).tolist(), lengths.tolist()
    if share:  # groups by their longest row
        groups = rollout.group.tolist()
        longest = {groups[row]: place for place, row in enumerate(order)}
        order.sort(key=lambda row: longest[groups[row]])
    batches, most = [[]], 0
    for row in order:
        most = max(most, lengths[row])
        if batches[-1] and most * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            most = lengths[row]
        batches[-1].append(row)
    device = rollout.tokens.device
    return [torch.tensor(batch, dtype=torch.int64, device=device) for batch in distributed.deal(batches)]


@torch.no_grad()
def score(
    model: nn.Module, rollout: Rollout, max_tokens: int, temperature: float = 1.0,
    vocab_size: int | None = None, share: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """token_logps of the whole rollout without gradient, micro-batch by micro-batch.  -> [N, T], [N, T]

    A model on a server knows no entropy (NaN), and log-probs of its whole vocabulary at temperature 1 only.
    """
    if hasattr(model, "urls"):
        return model.score(rollout, temperature)
    logps, entropies = torch.zeros_like(rollout.behaviour_logps), torch.zeros_like(rollout.behaviour_logps)
    for rows in micro_batches(rollout, max_tokens, share):
        logps[rows], entropies[rows] = token_logps(model, rollout[rows], temperature, vocab_size, share=share)
    return distributed.add_up(logps, entropies)


def carry(values: Tensor, source: Rollout, target: Rollout) -> Tensor:
    """Values on the source's sampled tokens to the same tokens of target.  [N, Ts] -> [N, Tt], 0 elsewhere

    source and target hold the same responses under different prompts (rollout.under_prompts).
    """
    if not torch.equal(source.loss_mask.sum(1), target.loss_mask.sum(1)):
        raise ValueError("source and target hold different responses: their rows differ in sampled tokens")
    return scatter(values[source.loss_mask.bool()], target)


def score_within(
    model: nn.Module, seen: Rollout, rollout: Rollout, max_tokens: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs of seen, on the positions of rollout, and the mask of the tokens that the model's context holds.

    seen and rollout hold the same responses under different prompts; what lies beyond the context has neither.
    """
    context = getattr(plain(model).config, "max_position_embeddings", None) or seen.tokens.shape[1]
    held = seen.attention_mask * (seen.attention_mask.cumsum(1) <= context)
    held = replace(seen, attention_mask=held, loss_mask=seen.loss_mask * held)
    logps, _ = score(model, held, max_tokens, temperature)
    return carry(logps, seen, rollout), carry(held.loss_mask, seen, rollout)
