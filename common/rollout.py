"""Rollouts: prompts in, sampled responses out, in the one layout that every method uses."""

import abc
import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from posttrain.common.cli import require
from posttrain.common.machines import distributed
from posttrain.common.models import device_of, plain, stop_ids
from posttrain.common.tasks import Example

BATCH_TOKENS = 2**16  # rows x tokens whose key-value cache an engine in this process may hold at one time


@dataclass
class Rollout:
    """N rows (prompts x group, the group's rows next to each other), right-padded to T tokens.

    ONE alignment: x[:, t] speaks of token t, so behaviour_logps[:, t] = log p(tokens[:, t] | tokens[:, :t]).

        tokens           p p a b $ .      prompt "p p", response "a b", end token $, padding
        attention_mask   1 1 1 1 1 0
        loss_mask        0 0 1 1 1 0
        turn            -1-1 0 0 0-1
    """

    tokens: Tensor  # [N, T] int64
    attention_mask: Tensor  # [N, T] fp32, 1 on real tokens
    loss_mask: Tensor  # [N, T] fp32, 1 on tokens that the policy sampled, the end token included
    turn: Tensor  # [N, T] int64, which of the model's turns wrote the token, -1 elsewhere
    behaviour_logps: Tensor  # [N, T] fp32, the sampler's log-probs at the sampling temperature, 0 elsewhere
    group: Tensor  # [N] int64, which prompt the row answers
    finished: Tensor  # [N] bool, ended by a stop token and not by length
    reward: Tensor  # [N] fp32, filled by grading
    texts: list[str]  # N decoded responses without special tokens
    examples: list[Example]  # N, the row's problem
    episodes: list  # N, what happened turn by turn (environments/episodes.py); None in single-turn rows

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor) -> "Rollout":
        """The given rows (int64 indices), width unchanged."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        index = rows.tolist()
        return Rollout(**{k: v[rows] if isinstance(v, Tensor) else [v[i] for i in index] for k, v in picked.items()})


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0 = greedy
    max_new_tokens: int = 32
    top_p: float = 1.0  # for evaluation; below 1 the policy that samples is not the one that trains


def seed_of(*key: int) -> int:
    """One well-mixed 63-bit seed from several integers, for example (seed, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def encode(tokenizer: "transformers.PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt, through the chat template when the tokenizer has one (base models: plain text)."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer("\n".join(m["content"] for m in messages))["input_ids"]


def assemble(
    prompts: list, responses: list, pad: int, logps: list | None = None, turns: list | None = None, **rest
) -> Rollout:
    """Rows from lists of prompt ids and of what follows them (and its log-probs, and the turn that wrote each token, -1
    the environment's; without turns all is turn 0) as a Rollout; rest fills other fields."""
    n, width = len(prompts), max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens, turn = torch.full((n, width), pad), torch.full((n, width), -1)
    attention_mask, behaviour_logps = torch.zeros(2, n, width)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
        turn[i, start:end] = torch.tensor(turns[i]) if turns else 0
        if logps:
            behaviour_logps[i, start:end] = torch.tensor(logps[i])
    blank = {"group": torch.arange(n), "finished": torch.ones(n, dtype=torch.bool), "texts": [""] * n}
    blank |= {"reward": torch.full((n,), torch.nan), "examples": [Example([], "")] * n, "episodes": [None] * n}
    return Rollout(tokens, attention_mask, (turn >= 0).float(), turn, behaviour_logps, **{**blank, **rest})


def written(
    tokenizer: "transformers.PreTrainedTokenizerBase", examples: list[Example], texts: list[str], n: int = 1
) -> Rollout:
    """Responses that nobody sampled, n to a prompt, as a Rollout, each closed by the end token."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    prompts = [encode(tokenizer, example.prompt) for example in examples]
    group = torch.arange(len(examples)) // n
    return assemble(prompts, ids, tokenizer.pad_token_id, texts=texts, examples=examples, group=group)


def under_prompts(rollout: Rollout, prompts: list[list[int]], pad: int) -> Rollout:
    """The SAME responses under OTHER prompts (a hint, a skill, feedback, a teacher's own template).

    prompts: N lists of ids. What follows the prompt moves as one block, environment tokens included, so the k-th
    sampled token of a row stays its k-th sampled token; scoring.carry brings values back to the old positions.
    """
    lengths = rollout.attention_mask.sum(1).long()
    starts = torch.minimum((rollout.loss_mask.cumsum(1) == 0).sum(1), lengths).tolist()  # of what follows the prompt
    lengths = lengths.tolist()
    moved = assemble(prompts, [[pad] * (end - start) for start, end in zip(starts, lengths, strict=True)], pad)
    for name in ("tokens", "loss_mask", "turn", "behaviour_logps"):
        source, target = getattr(rollout, name).cpu(), getattr(moved, name)
        for i, prompt in enumerate(prompts):
            block = source[i, starts[i] : lengths[i]]
            target[i, len(prompt) : len(prompt) + len(block)] = block
    same = {name: getattr(rollout, name) for name in ("group", "finished", "reward", "texts", "examples", "episodes")}
    return replace(to_device(moved, rollout.tokens.device), **same)


def concat(rollouts: list[Rollout], pad: int) -> Rollout:
    """Rollouts one after another as one, padded to the widest, groups renumbered."""
    width = max(r.tokens.shape[1] for r in rollouts)
    out: dict = {}
    for f in fields(Rollout):
        parts = [getattr(r, f.name) for r in rollouts]
        if f.name == "group":
            starts = [0, *itertools.accumulate(int(part.max()) + 1 for part in parts)]
            parts = [part + start for part, start in zip(parts, starts, strict=False)]
        elif isinstance(parts[0], Tensor) and parts[0].dim() == 2:
            fill = {"tokens": pad, "turn": -1}.get(f.name, 0)
            parts = [nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
        out[f.name] = torch.cat(parts) if isinstance(parts[0], Tensor) else list(itertools.chain(*parts))
    return Rollout(**out)


def to_device(rollout: Rollout, device: torch.device) -> Rollout:
    return replace(rollout, **{f.name: getattr(rollout, f.name).to(device) for f in fields(rollout)[:8]})


class Engine(abc.ABC):
    """A sampler. Engines differ in complete() and ready() alone."""

    def __init__(
        self, model: nn.Module, tokenizer: "transformers.PreTrainedTokenizerBase", batch_tokens: int = BATCH_TOKENS
    ):
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = stop_ids(model, tokenizer)
        self.batch_tokens = batch_tokens

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Around a batch: take over the weights that the model has now, hold what sampling needs."""
        yield

    @abc.abstractmethod
    def complete(self, contexts: list, u: Tensor, sampling: Sampling, stops=(), limits=(), memory=None) -> tuple:
        """What the model writes behind R lists of ids, up to the first stop token.  -> R lists of ids, of log-probs

        u [R, L] in [0, 1): the noise that decides each token, or of which an engine makes its seeds. stops: texts that
        end a row too. limits: most tokens of each row, L without. memory: filled here, for a later call whose contexts
        go on from these and what they became; an engine with a cache of its own leaves it empty.
        """

    def fit(self, prompts: list[list[int]], max_new_tokens: int) -> int:
        """The longest row's number of tokens, which must not exceed the model's positions."""
        longest = max(map(len, prompts)) + max_new_tokens
        limit = getattr(plain(self.model).config, "max_position_embeddings", None) or longest
        excess = f"prompts and --max-new-tokens take up to {longest} positions, the model has {limit}; lower the flag"
        require(longest <= limit, excess)
        return longest

    def generate(self, examples: list[Example], n: int, sampling: Sampling, key: tuple, starts: list = ()) -> Rollout:
        """n responses to each example, or to its ids in starts; reproducible in key, for example (seed, step)."""
        prompts = list(starts) or [encode(self.tokenizer, example.prompt) for example in examples]
        per_batch = max(1, self.batch_tokens // (n * self.fit(prompts, sampling.max_new_tokens)))
        noise = torch.Generator().manual_seed(seed_of(*key))
        u = torch.rand(len(prompts), n, sampling.max_new_tokens, generator=noise).flatten(0, 1)
        mine = distributed.part(len(prompts))
        prompts, examples = ([x for x in rows for _ in range(n)] for rows in (prompts, examples))
        ids, logps = [], []
        with self.ready(), distributed.together():
            for start in range(mine.start * n, mine.stop * n, per_batch * n):
                some = slice(start, min(start + per_batch * n, mine.stop * n))
                batch_ids, batch_logps = self.complete(prompts[some], u[some], sampling)
                ids += batch_ids
                logps += batch_logps
        ids, logps = distributed.gather(ids), distributed.gather(logps)
        rest = {"group": torch.arange(len(prompts)) // n, "logps": logps, "examples": examples}
        rest["finished"] = torch.tensor([bool(row) and row[-1] in self.stop_ids for row in ids])
        rest["texts"] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return to_device(assemble(prompts, ids, self.tokenizer.pad_token_id, **rest), device_of(self.model))


def check_rollout(kind: str) -> None:
    known = "give hf, vllm, or the addresses of vLLM servers, such as http://localhost:8000,http://localhost:8001"
    known = f"--rollout {kind!r}: {known}"
    require(kind in ("hf", "vllm") or all(x.startswith(("http://", "https://")) for x in kind.split(",")), known)


def make_engine(model: nn.Module, tokenizer: "transformers.PreTrainedTokenizerBase", config: Any = None) -> Engine:
    """The engine of --rollout for the policy; without config, of a frozen model where it is."""
    urls = getattr(model, "urls", "")  # a model behind servers
    kind = urls or (config.rollout if config else "hf")
    check_rollout(kind)
    if kind == "hf":
        from posttrain.common.engines.hf import HFEngine

        return HFEngine(model, tokenizer)
    if kind == "vllm":
        from posttrain.common.engines.local import VLLMEngine

        return VLLMEngine(model, tokenizer, config)
    from posttrain.common.engines.server import ServerEngine

    return ServerEngine(model, tokenizer, kind, push=not urls, out=getattr(config, "out", ""))
