"""vLLM servers as rollout engine: --rollout http://host:8000,http://host:8001

Token ids go in and come out (/inference/v1/generate), text is never encoded again. Every answer names the weights that
made it: a server that was started again, or that another run has given weights, is noticed at its first answer, gets
the current weights, and the answer is thrown away. Start each server with

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --enable-scale-out --logprobs-mode processed_logprobs

which lets everybody who can reach it change its weights: keep it inside the cluster. On CPUs see worker.py as well.
Weights travel by disk (write_weights), or between GPUs by NCCL if the server has --weight-transfer-config (nccl.py).
"""

import atexit
import contextlib
import hashlib
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn

from posttrain.common import models
from posttrain.common.cli import UserError, require
from posttrain.common.engines.client import GENERATE, MODELS, Failure, Server, Servers, field
from posttrain.common.machines import distributed
from posttrain.common.machines.weights import full_weights
from posttrain.common.models import device_of, plain
from posttrain.common.rollout import Engine, Sampling

LOWEST = -9999.0  # how vLLM writes a log-prob of -inf


class ServerEngine(Engine):
    """push: the servers follow the model's weights, which lie in a folder below `out` meanwhile; else they are left as
    they are (a frozen teacher). Raises UserError when no server is left, or one is started without what is needed."""

    def __init__(self, model: nn.Module, tokenizer: Any, urls: str, push: bool, out: str = ""):
        super().__init__(model, tokenizer, batch_tokens=sys.maxsize)  # the servers schedule the rows of a call
        self.push, self.version, self.tag, self.raw = push, None, "", ""
        self.vocab = plain(model).config.get_text_config().vocab_size
        name = distributed.from_first(uuid.uuid4().hex[:8])  # no other run's weights have it
        self.folder, self.own = (Path(out or "runs") / f"server-weights-{name}").resolve(), bool(out)
        self.servers = Servers(urls, "--rollout" if push else "--teacher", seconds_of_system(), self.prepare)
        self.nccl = None
        if push and device_of(model).type == "cuda":
            from posttrain.common.engines.nccl import Broadcast

            self.nccl = Broadcast(model, self.servers)
        if push and distributed.rank() == 0:
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        self.refresh()
        yield

    def refresh(self) -> None:
        """Under torchrun every rank gathers, the first writes and pushes, and all wait for it."""
        version = self.model.weights_version
        if not self.push or version == self.version:
            return
        self.version, self.tag = version, f"{self.folder.name}-{version}"
        for server in self.servers.servers:
            server.ready = False
        if not (self.nccl and self.nccl.send(self.tag)):
            write_weights(self.model, self.folder / self.tag)
        with distributed.together():
            if distributed.rank() == 0:
                self.servers.prepare_all()
                killed = self.folder.parent.glob("server-weights-????????") if self.own else ()  # --out is ours by now
                for old in (*killed, *self.folder.glob("*")):
                    if old != self.folder and old.name != self.tag:
                        shutil.rmtree(old, ignore_errors=True)

    async def prepare(self, server: Server, call: Any) -> None:
        """Give a server the current weights unless it has them, and look at its log-probs."""
        has = str(field(await call("/weight_info"), "weight_version")) if self.push else self.tag
        if self.push and not has.startswith(self.folder.name):  # new to us
            root = str(field(await call(MODELS), "data", 0, "root"))
            if Path(root, "config.json").is_file():  # vLLM loads what fits, and would leave a deeper model's rest
                same = sizes(transformers.AutoConfig.from_pretrained(root)) == sizes(plain(self.model).config)
                require(same, f"--rollout {server.url} serves {root!r}, a model of another size: serve --model's")
        if has != self.tag:
            folder = self.folder / self.tag
            if not folder.is_dir():
                raise Failure("it has lost the weights that came by NCCL; the next batch brings new ones")
            order = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            try:
                await call("/collective_rpc", order)
            except Failure as failure:
                raise Failure(
                    f"cannot load {folder} ({failure}); serve the run's --model, and keep --out on a disk that it reads"
                ) from None
            try:
                await call("/collective_rpc", {"method": "repack_heads"})
            except Failure as failure:  # a GPU's worker needs none
                stale = f"--rollout {server.url} runs on a CPU and would keep its old LM head: start it with "
                stale += "PYTHONPATH=methods and --worker-extension-cls posttrain.common.engines.worker.Worker"
                require("'CPUWorker' object has no attribute" not in str(failure), stale)
                if "has no attribute 'repack_heads'" not in str(failure):
                    raise
            await call("/update_weight_version", {"new_version": self.tag})
        for token in (0, 1):  # what may only be this token has a log-prob of 0, unless masks come later: raw_logprobs
            params = {"allowed_token_ids": [token], "max_tokens": 1, "logprobs": 0, "detokenize": False}
            body = {"token_ids": [0], "sampling_params": params | {"ignore_eos": True}}
            _, (logp,) = self.check(await call(GENERATE, body), body)
            raw = f"{self.servers.flag} {server.url} gives log-probs before temperature"
            self.raw = self.raw or (f"{raw}; start it with --logprobs-mode processed_logprobs" if logp else "")
        require(not self.push or not self.raw, self.raw)

    def complete(self, contexts: list, u: Tensor, sampling: Sampling, stops=(), limits=(), memory=None) -> tuple:
        """As Engine's. A row's seed is made of its own noise, whichever server answers. Below top_p 1 the log-probs are
        those of the truncated distribution, while HFEngine's are of the whole one. memory stays empty: a server has a
        prefix cache, here one for each version of the weights (cache_salt)."""
        common = {"temperature": sampling.temperature, "top_p": sampling.top_p, "logprobs": 0, "ignore_eos": True}
        common |= {"stop_token_ids": self.stop_ids, "stop": list(stops)}  # the model's own ends, not the server's
        common |= {"detokenize": bool(stops), "skip_special_tokens": False}  # text is only for finding stops
        bodies = []
        for context, noise, limit in zip(contexts, u, limits or [u.shape[1]] * len(u), strict=True):
            digest = hashlib.blake2b(noise[:limit].numpy().tobytes(), digest_size=8).digest()
            params = common | {"max_tokens": int(limit), "seed": int.from_bytes(digest, "little") >> 1}
            bodies.append({"token_ids": context, "sampling_params": params, "cache_salt": self.tag or "frozen"})
        answers = self.servers.ask(GENERATE, bodies, lambda answer, i: self.check(answer, bodies[i]))
        require(not self.raw or sampling.temperature in (0, 1), self.raw)  # at temperature 1 both are the same
        return [ids for ids, _ in answers], [logps for _, logps in answers]

    def check(self, answer: dict, body: dict) -> tuple[list[int], list[float]]:
        """The ids and log-probs of an answer. Raises Failure unless it is whole and of the current weights."""
        params = body["sampling_params"]
        limit, stops, ends = params["max_tokens"], params.get("stop"), params.get("stop_token_ids", ())
        try:
            (choice,) = answer["choices"]
            ids, content, reason = choice["token_ids"], choice["logprobs"]["content"], choice["finish_reason"]
            logps = [float(token["logprob"]) for token in content]
            same = [token["token_id"] for token in content] == ids
            versions = {span["version"] for span in choice["weight_versions"]}
            known = all(0 <= token < self.vocab for token in ids)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Failure(f"an answer of another form than vLLM 0.32's ({type(error).__name__}: {error})") from None
        ended = bool(ids) and (ids[-1] in ends or bool(stops))
        checks = {
            f"weights {sorted(map(str, versions))} instead of {self.tag}": not self.push or versions == {self.tag},
            f"{len(logps)} log-probs of {len(ids)} tokens": same,
            f"{len(ids)} tokens where 1 to {limit} were asked for": 0 < len(ids) <= limit,
            f"a token outside the vocabulary of {self.vocab}": known,
            "log-probs that are no finite numbers": all(LOWEST < logp < 1e-3 for logp in logps),
            f"an end by {reason!r} after {len(ids)} tokens": ended if reason == "stop" else reason == "length",
            "tokens behind the end": not any(token in ends for token in ids[:-1]),
        }
        for wrong, right in checks.items():
            if not right:
                raise Failure(f"it answered with {wrong}")
        short = "a server cut a row short of --max-new-tokens: raise its --max-model-len"
        require(reason != "length" or len(ids) == limit, f"{self.servers.flag}: {short}")
        return ids, logps


def sizes(config: Any) -> tuple[int, int]:
    text = config.get_text_config()
    return text.num_hidden_layers, text.vocab_size


def seconds_of_system() -> float:
    return getattr(models.SYSTEM, "server_seconds", 600.0)


def write_weights(model: nn.Module, folder: Path, shard_bytes: int = 4 * 2**30) -> None:
    """The model's weights in safetensors files that vLLM's reload_weights reads, written beside the folder and renamed
    into place. Every rank must call it, the first writes. In bfloat16 where the policy computes in it."""
    from safetensors.torch import save_file

    partial, shard, size, writes = folder.with_name(folder.name + ".partial"), {}, 0, distributed.rank() == 0
    try:
        if writes:
            partial.mkdir(parents=True, exist_ok=True)
        for name, weight in full_weights(model):
            if writes:
                shard[name] = weight.to("cpu", getattr(model, "autocast_dtype", None) or weight.dtype).contiguous()
                size += shard[name].nbytes
                if size > shard_bytes:
                    save_file(shard, partial / f"model-{name}.safetensors")
                    shard, size = {}, 0
        if writes:
            save_file(shard, partial / "model-last.safetensors")
            partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write the servers' weights to {folder} ({error.strerror}); choose another --out"
        ) from None
