"""A multi-layer perceptron as a transformers model: rows of numbers in, logits of classes out.

save_pretrained copies this file, which imports nothing of ours, beside the weights: a folder loads anywhere with
trust_remote_code=True, and here without it.
"""

import itertools

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MLPConfig(PretrainedConfig):
    model_type = "posttrain_mlp"
    input_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (12,)


class MLP(PreTrainedModel):
    config_class = MLPConfig
    main_input_name = "features"

    def __init__(self, config: MLPConfig):
        super().__init__(config)
        sizes = [config.input_size, *config.hidden_sizes]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: nn.Linear has initialised itself."""

    def forward(self, features: Tensor, **kwargs: object) -> SequenceClassifierOutput:
        """[N, input_size] -> logits [N, num_labels]"""
        x = features.to(self.classifier.weight.dtype)
        for layer in self.hidden:
            x = layer(x).relu()
        return SequenceClassifierOutput(logits=self.classifier(x))


AutoConfig.register("posttrain_mlp", MLPConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MLPConfig, MLP, exist_ok=True)
MLPConfig.register_for_auto_class()
MLP.register_for_auto_class("AutoModelForSequenceClassification")
