"""vLLM in the trainer's process, on the trainer's device (--rollout vllm); under torchrun one engine in each process.

The engine holds a copy of the policy in vLLM's own layout. refresh() pushes the weights into it whenever they have
changed, so vLLM never reads a weight from disk: it starts from the policy's config and tokenizer alone, wherever the
policy came from.
"""

import contextlib
import copy
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn

from posttrain.common.cli import UserError, first_line, launched, require
from posttrain.common.machines.weights import full_weights
from posttrain.common.models import device_of, plain
from posttrain.common.rollout import Engine, Sampling, seed_of

QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM on CPUs has no share of a GPU to take
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay where they are
}


class VLLMEngine(Engine):
    """Needs config.dtype, config.seed and config.system (cli.Engines). Raises UserError where vLLM cannot start."""

    def __init__(self, model: nn.Module, tokenizer: "transformers.PreTrainedTokenizerBase", config: Any):
        super().__init__(model, tokenizer, batch_tokens=sys.maxsize)  # vLLM schedules the rows of a call itself
        device, self.sleeps, self.version = device_of(model), config.system.vllm_sleep, None
        chosen = "--rollout vllm takes the first GPU that it sees: choose with CUDA_VISIBLE_DEVICES, not with --device"
        by_torchrun = launched()  # then the processes have met in distributed.start
        require(by_torchrun or not device.index, chosen)
        require(device.type != "cpu" or not self.sleeps, "--vllm-sleep frees a GPU's memory; leave it out on a CPU")
        missing = "pip install -r requirements-vllm.txt; without a GPU, scripts/vllm_cpu.sh makes an environment"
        require(importlib.util.find_spec("vllm"), f"--rollout vllm: vLLM is not installed: {missing}")
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)  # a user's own setting wins
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where weights can be handed over
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it speaks before it has looked there
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # torch's, about calls of vLLM
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        build = current_platform.device_type
        require(device.type == build, f"this vLLM is built for {build}: --device {build}, or --rollout hf")
        self.sampling_params = SamplingParams
        with tempfile.TemporaryDirectory() as folder:
            describe(model, tokenizer, Path(folder))
            try:
                self.llm = LLM(
                    folder,
                    load_format="dummy",  # the first refresh brings the weights
                    dtype=config.dtype,
                    max_model_len=-1,  # the model's positions, or as many as the cache has room for
                    gpu_memory_utilization=config.system.vllm_memory,
                    enforce_eager=device.type == "cpu",  # compiling takes longer than it saves
                    enable_sleep_mode=self.sleeps,
                    # Torchrun's processes: each with a whole model of its own, on the GPU of LOCAL_RANK.
                    distributed_executor_backend="external_launcher" if by_torchrun else "uni",
                    logprobs_mode="processed_logprobs",  # at the sampling temperature
                    generation_config="vllm",  # no defaults from the model's folder: we give every setting
                    seed=config.seed,
                )
            except Exception as error:  # of many types: no such architecture, no memory, no driver
                cause = str(error).partition("Value error, ")[2].partition(" [type=")[0] or first_line(error)
                mend = "lower --vllm-memory if memory lacks, else use --rollout hf"
                raise UserError(f"vLLM does not start with this model ({cause}); {mend}") from error
        log = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
        log.setLevel(logging.WARNING)
        log.addFilter(refuse_incomplete)
        if by_torchrun:  # at exit vLLM would close the process groups before distributed does
            self.llm.llm_engine.engine_core._finalizer.detach()
        self.sleep()

    def refresh(self) -> None:
        """reload_weights is vLLM's way that works in process on CPUs and GPUs alike. It undoes and repeats what vLLM
        makes of weights after loading, layer by layer (packed for the CPU's kernels, shuffled for a GPU's), and copies
        into the tensors that CUDA graphs point at; model.load_weights alone would leave packed copies stale. Its
        weight transfer (update_weights) moves between processes, over CUDA IPC or NCCL: not needed here.
        """
        asleep = self.sleeps and self.version is None
        if asleep:
            self.llm.wake_up(tags=["weights"])
        if self.version != self.model.weights_version:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(self.model)})
            self.llm.apply_model(repack_heads)
            self.llm.reset_prefix_cache()  # its keys and values came from the old weights
            self.version = self.model.weights_version
        if asleep:  # only now: the trainer's gathered weights are gone again
            self.llm.wake_up(tags=["kv_cache"])

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        self.refresh()
        yield
        self.sleep()

    def sleep(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)  # drops the weights too: the next batch most often needs new ones anyway
            self.version = None

    def fit(self, prompts: list[list[int]], max_new_tokens: int) -> int:
        longest, room = super().fit(prompts, max_new_tokens), self.llm.model_config.max_model_len
        raised = "VLLM_CPU_KVCACHE_SPACE (GiB)" if device_of(self.model).type == "cpu" else "--vllm-memory"
        require(longest <= room, f"a row may take {longest} tokens, vLLM's cache has room for {room}; raise {raised}")
        return longest

    def complete(self, contexts: list, u: Tensor, sampling: Sampling, stops=(), limits=(), memory=None) -> tuple:
        """As Engine's. A row's tokens depend on its own noise, of which a seed is made. Below top_p 1 the log-probs are
        those of the truncated distribution, while HFEngine's are of the whole one. memory stays empty: vLLM's prefix
        cache knows what it has read."""
        seeds = (u[:, :3].double() * 2**24).long().tolist()  # 24 random bits are in each number
        common = {"temperature": sampling.temperature, "top_p": sampling.top_p, "logprobs": 0, "flat_logprobs": True}
        common |= {"stop_token_ids": self.stop_ids, "stop": list(stops), "include_stop_str_in_output": True}
        common |= {"detokenize": bool(stops), "skip_special_tokens": False}  # text is only for finding stops
        params = [
            self.sampling_params(max_tokens=limit, seed=seed_of(*seed), **common)
            for seed, limit in zip(seeds, limits or [u.shape[1]] * len(u), strict=True)
        ]
        prompts = [{"prompt_token_ids": context} for context in contexts]
        rows = [out.outputs[0] for out in self.llm.generate(prompts, params, use_tqdm=False)]
        return [list(row.token_ids) for row in rows], [list(row.logprobs.logprobs) for row in rows]


def describe(model: nn.Module, tokenizer: "transformers.PreTrainedTokenizerBase", folder: Path) -> None:
    """A folder without weights, from which vLLM learns the architecture and the vocabulary."""
    config = copy.deepcopy(plain(model).config)
    config.architectures = config.architectures or [type(plain(model)).__name__]  # GGUF files name none
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what transformers dequantised on loading
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def repack_heads(model: nn.Module) -> None:
    """On CPUs a tied LM head multiplies by a packed copy of the embedding, which reload_weights leaves as it was
    (vLLM 0.32). Without effect on GPUs."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def refuse_incomplete(record: logging.LogRecord) -> bool:
    """A weight that did not arrive would stay random, and vLLM only warns of it."""
    lost = f"vLLM did not take over all weights ({record.getMessage()}); use --rollout hf"
    require(record.levelno < logging.WARNING, lost)
    return True
