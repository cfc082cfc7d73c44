"""Truncated importance sampling for an engine that rounds otherwise (--engine-tis)."""

import json
import math

import pytest
import torch

from posttrain.common.cli import System
from posttrain.common.engines.hf import HFEngine
from posttrain.common.training import engine_weights
from posttrain.methods import pi_distill, skill_sd, sod, uni_opd

SMALL = {"steps": 1, "prompts_per_step": 4, "group_size": 4, "eval_problems": 4, "eval_samples": 1, "eval_every": 0}


def test_against_a_loop_in_float64():
    noise = torch.Generator().manual_seed(0)
    logps, behaviour = torch.randn(2, 5, 7, dtype=torch.float64, generator=noise)
    mask = (torch.rand(5, 7, generator=noise) > 0.4).double()
    mask[2] = 0  # a response of no tokens
    behaviour[0, 0], mask[0, 0], logps[1, 1], mask[1, 1] = -math.inf, 1, -math.inf, 1
    found = engine_weights(logps.requires_grad_(), behaviour, mask, 1.5)
    for i in range(5):
        for t in range(7):
            p, q = logps[i, t].item(), behaviour[i, t].item()
            ratio = min(math.exp(p - q), 1.5) if math.isfinite(p) and math.isfinite(q) else 1.0
            assert found[i, t].item() == pytest.approx(mask[i, t].item() * ratio, abs=1e-12)
    assert not found.requires_grad and (found[mask > 0] > 1).any() and (found[mask > 0] < 1).any()


def test_off_it_is_the_mask():
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    assert torch.equal(engine_weights(torch.randn(1, 3), torch.randn(1, 3), mask, 0.0), mask)


@pytest.mark.parametrize("module", [uni_opd, sod, skill_sd, pi_distill])
def test_the_gradient_is_scaled_by_the_bounded_weight(module, tmp_path, monkeypatch):
    """An engine whose every log-prob is too low by log 3: the weight is 3, or its bound."""
    monkeypatch.setattr("posttrain.common.run.plot", lambda *args: None)
    monkeypatch.setattr("posttrain.common.models.SYSTEM", System())
    complete, norms = HFEngine.complete, {}

    def off(self, *args, **kwargs):
        ids, logps = complete(self, *args, **kwargs)
        return ids, [[logp - math.log(3) for logp in row] for row in logps]

    monkeypatch.setattr(HFEngine, "complete", off)
    reward = {"reward": "random"} if module is skill_sd else {}
    for most in (0.0, 2.0, 10.0):
        out = tmp_path / f"{most}"
        module.main(module.Config(**SMALL, **reward, engine_tis=most, out=str(out)))
        norms[most] = json.loads((out / "metrics.jsonl").read_text().splitlines()[1])["optim/grad_norm"]
    assert norms[0.0] > 0
    assert norms[2.0] / norms[0.0] == pytest.approx(2, rel=1e-3) and norms[10.0] / norms[0.0] == pytest.approx(
        3, rel=1e-3
    )
