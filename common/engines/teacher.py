"""A teacher on vLLM servers: --teacher http://host:8000, or several, comma-separated, that serve the same model.

Start each with `vllm serve FOLDER --enable-scale-out` (and --max-logprobs K for lists of more than 20 tokens). FOLDER
or hub name must be readable here too, for its tokenizer and config. Scores are vLLM's prompt_logprobs: of the whole
vocabulary at temperature 1, under --logprobs-mode raw_logprobs (the default) or processed_logprobs.
"""

import hashlib
import json
import sqlite3
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from posttrain.common.cli import UserError, require
from posttrain.common.engines.client import GENERATE, MODELS, Failure, Server, Servers, field
from posttrain.common.engines.server import LOWEST, seconds_of_system
from posttrain.common.machines import distributed
from posttrain.common.models import ONLY_AT_1, from_pretrained
from posttrain.common.rollout import Rollout


@cache
def served(urls: str) -> dict:
    """What the servers say of their model: root, the name it was loaded by, and max_model_len."""
    servers = Servers(urls, "--teacher", seconds_of_system(), None)
    card = servers.first(MODELS, lambda said: {key: field(said, "data", 0, key) for key in ("root", "max_model_len")})
    try:
        transformers.AutoConfig.from_pretrained(card["root"])
    except Exception:
        lacks = f"--teacher {urls}: its model {card['root']!r} is not here, whose tokenizer and config are needed"
        raise UserError(f"{lacks}; serve it from a folder or hub name that this machine can read too") from None
    return card


class ServerModel:
    """Stands where a frozen model does. `urls` tells the two apart: scoring.score() and make_engine() ask the servers;
    what needs hidden states or an LM head is refused there. cache: a folder that keeps scores by content (model name,
    a local folder's files of weights, tokens, k); make it anew when what is served changes without these."""

    def __init__(self, urls: str, device: torch.device, cache: str = ""):
        card = served(urls)
        self.urls, self.device, self.root = urls, device, card["root"]
        self.autocast_dtype, self.weights_version = None, 0  # as of a frozen model
        files = [(path.name, path.stat()) for path in sorted(Path(self.root).glob("*.safetensors"))]
        self.weights = [self.root, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)]
        self.config = from_pretrained(transformers.AutoConfig, self.root)
        text = self.config.get_text_config()
        self.vocab = text.vocab_size
        # A scored row needs room for one more token, which vLLM then writes.
        text.max_position_embeddings = min(card["max_model_len"] - 1, text.max_position_embeddings or sys.maxsize)
        try:
            self.generation_config = transformers.GenerationConfig.from_pretrained(self.root)
        except OSError:
            self.generation_config = transformers.GenerationConfig.from_model_config(self.config)
        self.servers = Servers(urls, "--teacher", seconds_of_system(), self.prepare)
        self.cache, self.recent, self.k = Cache(Path(cache)) if cache else None, {}, 0

    async def prepare(self, server: Server, call: Any) -> None:
        root = field(await call(MODELS), "data", 0, "root")
        require(root == self.root, f"--teacher {server.url} serves {root!r}, another {self.root!r}: start them alike")

    def eval(self) -> "ServerModel":
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "ServerModel":
        require(not requires_grad, f"{self.urls} is on a server and cannot train here")
        return self

    def parameters(self) -> list:
        return []

    def get_output_embeddings(self) -> torch.nn.Module:
        """Its size alone."""
        return torch.nn.Linear(1, self.vocab, device="meta")

    def score(self, rollout: Rollout, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs [N, T] of the sampled tokens, 0 elsewhere, -inf where the teacher rules a token out; an entropy is
        not to be had: NaN on them."""
        require(temperature == 1, ONLY_AT_1)
        logps, mine = torch.zeros_like(rollout.behaviour_logps), distributed.part(len(rollout))
        rows = torch.arange(len(rollout), device=logps.device)[mine]
        self.recent = {}
        found = self.ask(rollout[rows], self.k)
        logps[rows] = logps[rows].masked_scatter(
            rollout.loss_mask[rows].bool(), torch.cat([torch.zeros(0), *(x[:, 0] for x in found)]).to(logps)
        )
        distributed.add_up(logps)
        return logps, torch.where(rollout.loss_mask > 0, torch.nan, 0.0)

    def topk(self, rollout: Rollout, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens at each sampled token, row after row, and their log-probs.  -> [n, k], [n, k]"""
        require(temperature == 1, ONLY_AT_1)
        self.k = k  # from now on score() asks for them too, so that a batch is read once
        found = torch.cat([torch.zeros(0, 1 + 2 * k), *self.ask(rollout, k)])
        return found[:, 1 : 1 + k].long().to(self.device), found[:, 1 + k :].to(self.device)

    def ask(self, rollout: Rollout, k: int) -> list[Tensor]:
        """For each row [n, 1 + 2 k]: at its n sampled tokens their log-prob, the k likeliest ids, their log-probs."""
        jobs, keys, found = [], [], {}
        for tokens, sampled in zip(rollout.tokens.cpu(), rollout.loss_mask.cpu().bool(), strict=True):
            where = sampled.nonzero().squeeze(1).tolist()
            ids = tokens[: where[-1] + 1].tolist() if where else []
            said = json.dumps([self.weights, ids, where, k])
            keys.append(hashlib.blake2b(said.encode(), digest_size=20).digest())
            known = self.recent.get(keys[-1]) if where else torch.zeros(0, 1 + 2 * k)
            if known is None and self.cache:
                known = self.cache.get(keys[-1], (len(where), 1 + 2 * k))
            if known is not None:
                found[keys[-1]] = known
            else:
                jobs.append((keys[-1], ids, where))
        asks = {"max_tokens": 1, "prompt_logprobs": k, "detokenize": False}
        bodies = [{"token_ids": ids, "sampling_params": asks} for _, ids, _ in jobs]
        with distributed.together():
            answers = self.servers.ask(GENERATE, bodies, lambda answer, i: self.check(answer, *jobs[i][1:], k))
        new = {key: answer for (key, _, _), answer in zip(jobs, answers, strict=True)}
        if self.cache:
            self.cache.put(new)
        self.recent |= found | new
        return [self.recent[key] for key in keys]

    def check(self, answer: dict, ids: list[int], where: list[int], k: int) -> Tensor:
        """The scores of an answer.  -> [n, 1 + 2 k]. Raises Failure unless it is whole."""
        rows = []
        try:
            said = answer["prompt_logprobs"]
            if len(said) != len(ids):
                raise Failure(f"it answered with {len(said)} log-probs of {len(ids)} tokens")
            for at in where:
                ranked = sorted(said[at].items(), key=lambda item: item[1]["rank"])[:k]
                logps = [x["logprob"] for x in (said[at][str(ids[at])], *(x for _, x in ranked))]
                rows.append([logps[0], *(int(token) for token, _ in ranked), *logps[1:]])
            scores = torch.tensor(rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Failure(f"an answer of another form than vLLM 0.32's ({type(error).__name__}: {error})") from None
        if scores.shape != (len(where), 1 + 2 * k):
            raise Failure(f"it answered with fewer than {k} likeliest tokens")
        listed, logps = scores[:, 1 : 1 + k], torch.cat([scores[:, :1], scores[:, 1 + k :]], 1)
        if not (logps.isfinite() & (logps < 1e-3)).all():
            raise Failure("it answered with log-probs that are no finite numbers")
        if not ((listed >= 0) & (listed < self.vocab)).all():
            raise Failure(f"it answered with a token outside the vocabulary of {self.vocab}")
        return torch.where((scores <= LOWEST) & (scores < 0), -torch.inf, scores)


class Cache:
    """Scores by content in one SQLite file, which several processes may share. What is damaged is computed again."""

    def __init__(self, folder: Path):
        self.path = folder / "scores.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.open()
        except (OSError, sqlite3.OperationalError) as error:
            raise UserError(f"cannot write --teacher-cache {folder} ({error}); choose another folder") from None
        except sqlite3.DatabaseError:  # not a database any more
            self.path.unlink()
            self.open()

    def open(self) -> None:
        self.table = sqlite3.connect(self.path, timeout=60)
        self.table.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value BLOB, digest BLOB)")

    def get(self, key: bytes, shape: tuple[int, int]) -> Tensor | None:
        try:
            row = self.table.execute("SELECT value, digest FROM scores WHERE key = ?", (key,)).fetchone()
        except sqlite3.DatabaseError:
            return None
        if row is None or hashlib.blake2b(key + row[0], digest_size=8).digest() != row[1]:
            return None
        return torch.from_numpy(np.frombuffer(row[0], np.float32).reshape(shape).copy())

    def put(self, scores: dict[bytes, Tensor]) -> None:
        rows = [(key, value.numpy().tobytes()) for key, value in scores.items()]
        digests = [hashlib.blake2b(key + value, digest_size=8).digest() for key, value in rows]
        try:
            with self.table:  # one transaction: all or nothing
                many = [(*row, digest) for row, digest in zip(rows, digests, strict=True)]
                self.table.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", many)
        except sqlite3.DatabaseError:
            pass  # a damaged page: these scores are not kept
