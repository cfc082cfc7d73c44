"""A policy's weights as a checkpoint on disk holds them, and what it started from under its adapters."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from posttrain.common.machines.weights import full_weights, save_model
from posttrain.common.models import load_model, load_start, load_tokenizer
from posttrain.common.rollout import written
from posttrain.common.scoring import score, token_logps
from posttrain.common.tasks import make_task

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": 64}


def adapted():
    model = load_model("addition-student", CPU, lora_rank=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


MODELS = {
    "tied": lambda: load_model("addition-student", CPU),
    "adapters": adapted,
    "fused experts, untied": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS)),
    "transposed": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_full_weights_are_those_of_a_saved_folder(kind, tmp_path):
    model = MODELS[kind]()
    held = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = {name: weight.clone() for name, weight in full_weights(model)}
    assert all(torch.equal(weight, held[name]) for name, weight in model.state_dict().items())
    save_model(model, None, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == saved.keys() and len(found) > 20
    assert all(torch.equal(weight, saved[name]) for name, weight in found.items())


def test_full_weights_gathers_shards(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    whole = {name: weight.clone() for name, weight in full_weights(model)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert any(hasattr(weight, "full_tensor") for weight in model.parameters())
        found = dict(full_weights(model))
        assert found.keys() == whole.keys() and not any(hasattr(weight, "full_tensor") for weight in found.values())
        assert all(torch.equal(weight, whole[name]) for name, weight in found.items())
    finally:
        torch.distributed.destroy_process_group()


def test_the_start_under_adapters_is_the_base_without_a_copy():
    """The reference of --beta, and a teacher `self`, with --lora-rank."""
    start = load_model("addition-student", CPU, train=False)
    policy = adapted()
    reference = load_start(policy, "addition-student", CPU)
    rows = written(load_tokenizer("addition-student"), make_task("addition").heldout(4), ["1=1", "23=5", "4", ""])
    expected, (now, _), (then, _) = score(start, rows, 100)[0], score(policy, rows, 100), score(reference, rows, 100)
    assert torch.equal(then, expected) and (now - expected).abs().max() > 0.01
    assert {w.data_ptr() for w in reference.parameters()} == {w.data_ptr() for w in policy.parameters()}
    token_logps(policy, rows)[0].sum().backward()  # the policy's adapters are back, and train
    assert any(w.grad is not None and w.grad.any() for w in policy.parameters())
    whole = load_start(start, "addition-student", CPU)
    assert not any(w.requires_grad for w in whole.parameters()) and whole is not start
