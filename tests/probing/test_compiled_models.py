"""A compiled model sees the perturbed weights: the estimator edits them in place."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import fogzo


@pytest.mark.parametrize("preset", [fogzo.lsq(2, granularity="channel"), fogzo.quest(2)])
def test_a_compiled_model_is_refined_like_an_eager_one(preset):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, generator=generator)
    y = torch.randint(5, (32,), generator=generator)
    eager = torch.nn.Sequential(
        torch.nn.Linear(16, 32),
        torch.nn.BatchNorm1d(32),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(32, 5),
    )
    fogzo.quantize_(eager, preset)
    compiled = copy.deepcopy(eager)
    refined, losses = [], []
    for model, forward in (
        (eager, eager),
        (compiled, torch.compile(compiled, backend="aot_eager")),
    ):
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=1e-3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(2):  # the second call runs on the graphs that the first one made
                model.zero_grad()
                with estimator.record_rng():
                    loss = cross_entropy(forward(x), y)
                    loss.backward()
                stats = estimator.refine_grads_(
                    lambda f=forward: cross_entropy(f(x), y), expected_loss=loss
                )
        refined.append([p.grad for p in model.parameters()])
        losses.append(stats.probe_losses)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(refined[0], refined[1])
    assert losses[0][0] != losses[0][1]
