"""Texts with a class, and prompts with an answer: files and `datasets` names as tables of labelled/batches.py."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.common.cli import require
from posttrain.common.families.rows import LabelledRows, Rows, load_rows
from posttrain.common.labelled.batches import Batch, Reader
from posttrain.common.rollout import encode
from posttrain.common.tasks import Example

SPLITS = ("validation", "validation_matched", "test")  # GLUE's test labels are hidden


class Classes(LabelledRows):
    kind = "classify"

    def __init__(self, name: str, *columns: str):
        super().__init__(name, *load_rows(name, SPLITS), *columns)

    def collate(self, split: str, rows: list[int], reader: Reader) -> Batch:
        examples = [getattr(self, split)[row] for row in rows]
        texts = zip(*([turn["content"] for turn in example.prompt] for example in examples), strict=True)
        options = {"truncation": True, "max_length": reader.max_length, "padding": True, "return_tensors": "pt"}
        inputs = reader.tokenizer(*map(list, texts), **options).to(reader.device)
        labels = torch.tensor([self.number[example.answer] for example in examples], device=reader.device)
        return Batch({**inputs}, labels, torch.arange(len(rows), device=reader.device))


class Answers(Rows):
    """Prompts with answers, encoded for each reader. The longest input is that of prompt and answer together in causal
    models, of each in encoder-decoders; a row of which a reader is left no token of the answer is left out.
    """

    names = ()

    def __init__(self, name: str, kind: str, prompt_column: str, answer_column: str, readers: list[Reader]):
        super().__init__(name, *load_rows(name, SPLITS), prompt_column, answer_column)
        self.kind, self.encoded, self.left_out = kind, {}, 0
        for split in ("train", "test"):
            every = [[self.encode(example, reader) for reader in readers] for example in getattr(self, split)]
            kept = [i for i, each in enumerate(every) if all(answer for _, answer, _ in each)]
            none = f"--max-length {readers[0].max_length} leaves nothing of any answer in the {split} rows of {name!r}"
            require(kept, f"{none}; raise it")
            self.left_out += len(every) - len(kept)
            setattr(self, split, [getattr(self, split)[i] for i in kept])
            self.encoded |= {(split, id(reader)): [every[i][k] for i in kept] for k, reader in enumerate(readers)}

    def encode(self, example: Example, reader: Reader) -> tuple[list[int], list[int], bool]:
        tokenizer, longest, causal = reader.tokenizer, reader.max_length, self.kind == "causal"
        prompt = encode(tokenizer, example.prompt) or [tokenizer.eos_token_id]
        bare = {"add_special_tokens": False} if causal else {}  # encoder-decoders: as their family writes targets
        answer = tokenizer(text_target=str(example.fields["solution"]), **bare)["input_ids"]
        answer += [tokenizer.eos_token_id] * (answer[-1:] != [tokenizer.eos_token_id])
        room = max(0, longest - len(prompt)) if causal else longest
        return prompt[:longest], answer[:room], len(answer) > room  # the last: cut

    def collate(self, split: str, rows: list[int], reader: Reader) -> Batch:
        prompts, answers, cut = zip(*(self.encoded[split, id(reader)][row] for row in rows), strict=True)
        if self.kind == "causal":  # the state at t - 1 predicts token t
            inputs = padded([p + a for p, a in zip(prompts, answers, strict=True)], reader)
            starts = [len(p) - 1 for p in prompts]
        else:  # the decoder reads the answer one token late: its state at t predicts token t
            late, starts = padded([[reader.start, *a[:-1]] for a in answers], reader), [0] * len(rows)
            inputs = padded(prompts, reader) | {f"decoder_{key}": value for key, value in late.items()}
        at = torch.zeros_like([*inputs.values()][-1], dtype=torch.bool)
        for row, (start, answer) in enumerate(zip(starts, answers, strict=True)):
            at[row, start : start + len(answer)] = True
        labels = torch.cat([torch.tensor(answer) for answer in answers]).to(reader.device)
        return Batch(inputs, labels, at.nonzero()[:, 0], at, sum(cut))


def padded(ids: list[list[int]], reader: Reader) -> dict[str, Tensor]:
    tokens = pad_sequence([torch.tensor(row) for row in ids], True, reader.tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in ids], True)
    return {"input_ids": tokens.to(reader.device), "attention_mask": mask.to(reader.device)}
