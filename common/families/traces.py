"""Problems whose search can be written out state by state: what continuous chains of thought are taught from."""

from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

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

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word for each symbol."""
        words = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(self.vocabulary)}, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
