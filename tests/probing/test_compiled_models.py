"""A compiled model sees the perturbed weights: the estimator edits them in place."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo
from toolbox import draw, streams_put_back


def test_a_compiled_model_is_refined_like_an_eager_one():
    x, y = draw(32, 16), draw(32, 5, seed=1).argmax(1)
    with streams_put_back(seed=0):
        eager = nn.Sequential(
            nn.Linear(16, 32),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(32, 32),
            nn.Linear(32, 5),
        )
    fogzo.quantize_(eager, fogzo.lsq(2, granularity="channel"), lambda module, name: name == "0")
    fogzo.quantize_(eager, fogzo.quest(2), lambda module, name: name == "4")
    compiled = copy.deepcopy(eager)
    refined, losses = [], []
    for model, forward in (
        (eager, eager),
        (compiled, torch.compile(compiled, backend="aot_eager")),
    ):
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=1e-3)
        with streams_put_back(seed=0):
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
