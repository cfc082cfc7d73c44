"""What a vLLM server on CPUs needs of us: PYTHONPATH=methods vllm serve ... --worker-extension-cls NAME.

NAME is posttrain.common.engines.worker.Worker. On CPUs a tied LM head multiplies by a packed copy of the embedding,
which vLLM 0.32's reload_weights leaves as it was: without this its logits would come from the old weights.
"""


class Worker:
    """A mixin of vLLM's worker, whose methods POST /collective_rpc can name. Without effect on GPUs."""

    def repack_heads(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for layer in self.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
