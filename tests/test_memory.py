"""--dry-run: estimates against the bytes of real tensors after a real step, and nothing loaded or written."""

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
import transformers

from posttrain.common.cli import Engines, UserError
from posttrain.common.engines.hf import HFEngine
from posttrain.common.machines.memory import activations, at_rest, cache_bytes, estimate, models_of, report, skeleton
from posttrain.common.models import autocast, load_model, load_tokenizer, plain
from posttrain.common.rollout import Sampling
from posttrain.common.scoring import token_logps
from posttrain.common.tasks import make_task
from posttrain.common.training import Optimizer
from posttrain.methods import grpo, opd, pi_distill, rltf, skill_sd, uni_opd

CPU, ROWS, WIDTH = torch.device("cpu"), 3, 40
METHODS = ("grpo", "opd", "pi_distill", "rltf", "scope_opd", "skill_sd", "sod", "uni_opd", "sinkd", "cot2")
SMOLLM2 = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"  # scripts/get_smollm2.py makes it
CASES = [("addition-student", "float32", 0), ("addition-student", "bfloat16", 0), ("addition-student", "float32", 4)]
CASES += [("sokoban-student", "bfloat16", 8)]
CASES += [(str(SMOLLM2), "float32", 0)] if SMOLLM2.is_dir() else []


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)).rpartition("/")[2])
def pair(request):
    """The estimate's model and the real one."""
    name, dtype, lora_rank = request.param
    return skeleton(name, dtype, lora_rank, True), load_model(name, CPU, dtype, lora_rank), name, dtype


def saved_bytes(model) -> int:
    """Of different storages that autograd keeps of the body's forward pass, weights aside."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(model):
        plain(model).base_model(input_ids=torch.zeros(ROWS, WIDTH, dtype=torch.int64), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def test_weights_gradients_and_moments_are_those_of_a_real_step(pair):
    expected, real, name, _ = pair
    tokenizer, task = load_tokenizer(name), make_task("addition")
    rollout = HFEngine(real, tokenizer).generate(task.draw(1, 0), 2, Sampling(1.0, 4), (0,))
    optimizer = Optimizer(real, grpo.Config())
    token_logps(real, rollout)[0].sum().backward()
    gradients = sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)
    optimizer.step(1)
    state = optimizer.adamw.state.values()
    moments = sum(x[key].nbytes for x in state for key in ("exp_avg", "exp_avg_sq"))
    held = at_rest(expected)
    weights = list(real.parameters())
    assert held["parameters"] == sum(p.numel() for p in weights)
    assert held["trained"] == sum(p.numel() for p in weights if p.requires_grad) > 0
    assert held["weights"] == sum(p.nbytes for p in weights)
    assert (held["gradients"], held["moments"]) == (gradients, moments)


def test_activations_are_what_autograd_keeps(pair):
    expected, real, *_ = pair
    kept, largest = activations(expected, ROWS, WIDTH)
    measured = saved_bytes(real)
    assert measured / 1.02 < kept < measured * 1.02
    layers = real.config.num_hidden_layers
    assert kept / layers / 1.5 < largest < kept / layers * 1.5
    recomputed, _ = activations(expected, ROWS, WIDTH, checkpointing=True)
    inputs = layers * ROWS * WIDTH * real.config.hidden_size * 4
    assert inputs + largest <= recomputed < kept


def test_cache_is_what_the_sampler_holds(pair):
    expected, real, *_ = pair
    cache = transformers.DynamicCache(config=real.config)
    with torch.no_grad(), autocast(real):
        plain(real).base_model(torch.zeros(ROWS, WIDTH, dtype=torch.int64), past_key_values=cache, use_cache=True)
    assert cache_bytes(expected, ROWS, WIDTH) == sum(x.nbytes for c in cache.layers for x in (c.keys, c.values))


def test_frozen_models_are_held_in_dtype_and_copies_of_the_policy_in_fp32():
    held, _ = estimate(opd.Config(dtype="bfloat16"))
    assert held["teacher"]["weights"] == 2 * held["teacher"]["parameters"]
    assert held["teacher"]["trained"] == held["teacher"]["gradients"] == held["teacher"]["moments"] == 0
    held, _ = estimate(grpo.Config(dtype="bfloat16", beta=0.1))
    assert held["reference"]["weights"] == held["policy"]["weights"] == 4 * held["policy"]["parameters"]


@pytest.mark.parametrize(
    "config, parts",
    [
        (grpo.Config(), {"policy"}),
        (grpo.Config(beta=0.1), {"policy", "reference"}),
        (grpo.Config(beta=0.1, lora_rank=4), {"policy"}),
        (opd.Config(), {"policy", "teacher"}),
        (opd.Config(teacher="self"), {"policy", "teacher"}),
        (opd.Config(teacher="self", teacher_sync="live"), {"policy"}),
        (opd.Config(teacher="http://localhost:8000"), {"policy"}),
        (uni_opd.Config(), {"policy", "teacher arithmetic-add-teacher", "teacher arithmetic-mul-teacher"}),
        (pi_distill.Config(), {"policy"}),
        (pi_distill.Config(opsd_teacher="ema", reference="base"), {"policy", "teacher", "reference"}),
        (skill_sd.Config(), {"policy", "teacher"}),
        (skill_sd.Config(teacher_sync="live", summarizer="some/model"), {"policy", "summarizer"}),
        (rltf.Config(), {"policy"}),
        (rltf.Config(critic="column:hint"), {"policy"}),
        (rltf.Config(critic="lookup-doubter"), {"policy", "critic"}),
    ],
)
def test_models_are_those_that_main_loads(config, parts):
    assert set(models_of(config)) == parts


def test_shards_divide_what_is_at_rest_and_one_layer_is_gathered():
    whole, parts = estimate(grpo.Config())
    shared, sharded = estimate(grpo.Config(system=Engines(shard="fsdp", processes=4)))
    for key in ("weights", "gradients", "moments"):
        assert shared["policy"][key] == -(-whole["policy"][key] // 4)
    assert 0 < shared["policy"]["gathered"] < whole["policy"]["weights"]
    assert sharded["gathered by FSDP"]["update"] == 2 * shared["policy"]["gathered"]
    assert sharded["gathered by FSDP"]["sample"] == whole["policy"]["weights"]
    assert not parts["gathered by FSDP"]["update"]
    half, computing = estimate(grpo.Config(dtype="bfloat16", system=Engines(shard="fsdp", processes=4)))
    assert 2 * half["policy"]["whole"] == shared["policy"]["whole"]
    assert computing["activations"]["update"] < sharded["activations"]["update"]


def test_memory_grows_with_what_fills_it():
    update = lambda **flags: estimate(grpo.Config(**flags))[1]["activations"]["update"]  # noqa: E731
    assert update(micro_batch_tokens=4096) < update() < update(micro_batch_tokens=16384)
    assert update(system=Engines(checkpointing=True)) < update()
    sample = lambda **flags: estimate(grpo.Config(eval_problems=1, **flags))[1]["key-value cache"]["sample"]  # noqa: E731
    assert 2 * sample(prompts_per_step=4) == sample(prompts_per_step=8)
    assert sample(prompts_per_step=10**4) == sample(prompts_per_step=10**5)  # never more than BATCH_TOKENS at a time
    assert sample(rollout="vllm") == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_and_stops_before_anything_is_written(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"posttrain.methods.{method}")
    config = module.Config()
    config = dataclasses.replace(config, system=dataclasses.replace(config.system, dry_run=True))
    with pytest.raises(SystemExit) as stop:
        module.main(config)
    assert stop.value.code == 0
    assert not list(tmp_path.iterdir())
    assert ("no estimate" if method in ("sinkd", "cot2") else "Largest part: ") in capsys.readouterr().out


def test_a_share_for_vllm_and_what_waits_on_the_cpu_are_told(capsys):
    report(grpo.Config(rollout="vllm", system=Engines(shard="fsdp", cpu_offload=True, processes=2)))
    said = capsys.readouterr().out
    assert "vLLM takes 40% of each GPU on top, in all phases" in said
    assert "In CPU memory wait" in said and "policy: weights" not in said


def test_a_model_or_an_engine_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--rollout 'vlm'"):
        report(grpo.Config(rollout="vlm"))
    with pytest.raises(UserError, match="cannot load 'no-such-model'"):
        report(opd.Config(teacher="no-such-model"))
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no causal language model: its config says vit"):
        report(grpo.Config(model=str(tmp_path)))
