"""Problems whose search can be written out state by state: what continuous chains of thought are taught from."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from posttrain.common.cli import require
from posttrain.common.models import load_model
from posttrain.common.run import sample_rows

SPECIAL = ("<pad>", "<bos>", "<eos>", "->")
PAD, BOS, EOS, ARROW = range(4)


@dataclass
class Traces:
    """The first n_train problems are for training, the others held out; all have n symbols and m steps."""

    name: str
    vocabulary: list[str]  # V symbols, begins with SPECIAL
    prompts: Tensor  # [problems, n] int64, BOS first
    paths: Tensor  # [problems, P, m] int64: every way through the search, those that a budget keeps longest first
    chains: Tensor  # [problems, m] int64: the one way that a discrete chain of thought is taught; its end is the answer
    n_train: int

    def tokenizer(self) -> "transformers.PreTrainedTokenizerFast":
        """A word for each symbol."""
        words = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(self.vocabulary)}, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
        )

    def show(self, console: Console, step: int, prompts: Tensor, alpha: Tensor, answers: Tensor) -> list[dict]:
        """The surest, the most mistaken and one more problem, with what each step weighs most; printed and returned.

        prompts [N, n], alpha [N, steps, V], answers [N]
        """
        chance, rows = alpha[:, -1].gather(1, answers[:, None])[:, 0], []
        for kind, i in sample_rows(chance, step).items():
            steps = []
            for weights, ids in zip(*(x.tolist() for x in alpha[i].topk(min(4, alpha.shape[-1]))), strict=True):
                heard = zip(weights, ids, strict=True)
                steps.append(" ".join(f"{self.vocabulary[j]}:{w:.2f}" for w, j in heard if w >= 0.005))
            prompt = " ".join(self.vocabulary[j] for j in prompts[i].tolist())
            answer = self.vocabulary[answers[i]]
            rows.append({"kind": kind, "prompt": prompt, "text": " | ".join(steps), "answer": answer})
            rows[-1]["reward"] = chance[i].item()
            line = f"  {kind:5} {prompt} >> {rows[-1]['text']}  (answer {answer})"
            console.print(line, markup=False, no_wrap=True, overflow="ellipsis")
        return rows


def make_model(config: Any, task: Traces, device: torch.device, new: bool = True) -> nn.Module:
    """The model whose vocabulary is the task's symbols. A body with another gets new embeddings, if it may."""
    size, length = len(task.vocabulary), task.prompts.shape[1] + 2 * task.paths.shape[2] + 2
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if config.model == "scratch":
        require(config.width % config.heads == 0, "--width must be a multiple of --heads")
        shape = {"n_embd": config.width, "n_layer": config.layers, "n_head": config.heads, "n_positions": length}
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=size, **shape, **rates, **special)).to(
            device
        )
        model.config.symbols = task.vocabulary
        model.autocast_dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
        return model
    model = load_model(config.model, device, config.dtype)
    longest = getattr(model.config, "max_position_embeddings", length)
    require(longest >= length, f"--task {config.task} has up to {length} positions, the model {longest}")
    if getattr(model.config, "symbols", None) != task.vocabulary:
        require(new, f"{config.model!r} was not trained on the symbols of --task {config.task}")
        model.resize_token_embeddings(size)
        for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
            nn.init.normal_(table.weight, std=0.02)
            table.padding_idx = None  # else the row of what is another symbol now would not learn
    model.config.symbols = task.vocabulary
    for name, value in special.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    return model
