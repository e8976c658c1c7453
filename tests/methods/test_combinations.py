"""FOGZO on top of other methods: where it can measure, and where it says that it cannot."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from fogzo.methods import GridPull, cage, cewt, dampening, quantize_from
from toolbox import draw, everything, fill

STEPS = 12


def network(quantizer):
    model = fill(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)))
    return fogzo.quantize_(model, quantizer, everything)


def train(model, estimator=None, before=None, after=None, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for step in range(STEPS):
        x = draw(32, 16, seed=step)
        loss_of = lambda x=x: mse_loss(model(x), x[:, :4])  # noqa: E731
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        if estimator is not None:
            found.append(estimator.refine_grads_(loss_of, expected_loss=loss))
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after()
    return found


def fogzo_of(model, **options):
    return fogzo.FogzoEstimator(fogzo.quantized_weights(model), **options)


@pytest.mark.parametrize(
    "quantizer",
    [
        fogzo.bbq(2),
        fogzo.bbq(4, learned=False),
        fogzo.quest(2, detach_scale=False),
        fogzo.lsq(2, init="range", surrogate="trust", granularity="channel"),
        fogzo.fixed(2, surrogate="stable_qat"),
    ],
    ids=["bbq", "bbq without learned steps", "quest", "seq", "stable_qat"],
)
def test_quantizers_and_slopes_are_measured(quantizer):
    stats = train(model := network(quantizer), fogzo_of(model))
    assert all(found.fallback is None for found in stats)
    assert all(abs(found.agreement) < 10 for found in stats)


def test_the_agreement_of_a_crested_slope_is_its_height_over_its_mean_square():
    # Weights round differently at thresholds, where the slope and so the move is largest.
    torch.manual_seed(0)
    agreements = {}
    for normalized in (True, False):
        surrogate = fogzo.quantizers.surrogates.stable_qat(normalized=normalized)
        model = fill(nn.Sequential(nn.Linear(256, 256, bias=False)), 1.0)
        fogzo.quantize_(model, fogzo.fixed(8, step_size=0.1, surrogate=surrogate), everything)
        x, y = draw(64, 256), draw(64, 256, seed=1)
        estimator = fogzo_of(model, noise_share=0.0, agreement="measured", num_samples=1)
        loss_of = lambda x=x, y=y, model=model: mse_loss(model(x), y)  # noqa: E731
        loss = loss_of()
        loss.backward()
        stats = estimator.refine_grads_(loss_of, expected_loss=loss)
        agreements[normalized] = stats.agreement
    assert agreements[False] == pytest.approx(6.11, rel=0.15)
    assert agreements[False] / agreements[True] == pytest.approx(1 / 0.30246, rel=0.01)


def test_weights_on_their_levels_keep_the_gradient_and_say_so():
    model = network(fogzo.fixed(2))
    GridPull(model, 1.0).pull_()
    estimator, x = fogzo_of(model), draw(32, 16)
    loss_of = lambda: mse_loss(model(x), x[:, :4])  # noqa: E731
    loss = loss_of()
    loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="pull to the grid"):
        stats = estimator.refine_grads_(loss_of, expected_loss=loss)
    assert "no weight rounds differently" in stats.fallback
    assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))


def test_on_top_of_cage_it_changes_nothing_once_weights_are_on_the_grid():
    losses = {}
    for with_fogzo in (False, True):
        model = network(fogzo.fixed(2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        pull = cage(model, optimizer, total_steps=1, strength=100.0)  # on the grid at once
        GridPull(model, 1.0).pull_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            stats = train(
                model,
                fogzo_of(model) if with_fogzo else None,
                after=pull.pull_,
                optimizer=optimizer,
            )
        assert all(found.fallback for found in stats)
        losses[with_fogzo] = [p.detach() for p in model.parameters()]
    assert all(map(torch.equal, losses[False], losses[True]))


def test_after_a_float_phase_it_starts_with_quantization():
    model = network(fogzo.lsq(2))
    share = fogzo.linear_noise_share(total_steps=STEPS, start=0.5)
    switch = quantize_from(model, 0.5, total_steps=STEPS)
    stats = train(model, fogzo_of(model, noise_share=share), after=switch.advance_)
    assert [found.agreement is None for found in stats] == [True] * 6 + [False] * 6
    assert all(found.fallback is None for found in stats)


def test_dampening_comes_after_it_and_cewt_with_it():
    model = network(fogzo.fixed(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    constraint = cewt(model, optimizer)
    penalty = dampening(model, total_steps=STEPS)
    stats = train(model, fogzo_of(model), before=penalty.add_grads_, optimizer=optimizer)
    assert all(found.fallback is None for found in stats)
    for weight in constraint.weights:
        norm = constraint.norms[weight.name]
        assert weight.param.norm().item() == pytest.approx(norm, rel=1e-6)
