"""The error of an agreement where inputs are quantized, too, which scatters more."""

import math
from statistics import median, stdev

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo

STEPS, FIRST = 80, 10


def network(activations):
    torch.manual_seed(0)
    layers = (nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    model = fogzo.quantize_(
        nn.Sequential(*layers), fogzo.lsq(2), lambda *_: True, activations=activations
    )
    if activations is not None:
        with fogzo.calibrate_(model):
            model(torch.randn(200, 32))
    return model


def train(model, steps=STEPS, estimator=None, expects=True, **options):
    """The estimator, and the agreements and errors of its steps."""
    estimator = estimator or fogzo.FogzoEstimator(fogzo.quantized_weights(model), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        x = torch.randn(64, 32)
        y = x[:, :10].argmax(1)
        loss = cross_entropy(model(x), y)
        loss.backward()
        expected = loss if expects else None
        stats = estimator.refine_grads_(lambda x=x, y=y: cross_entropy(model(x), y), expected)
        optimizer.step()
        optimizer.zero_grad()
        found.append((stats.agreement, stats.agreement_error))
    return estimator, *zip(*found, strict=True)


def test_it_is_as_wide_as_agreements_scatter():
    _, _, of_weights = train(network(None))
    estimator, agreements, errors = train(network(fogzo.lsq(2)))
    scatter = stdev(agreements[FIRST:])
    assert median(of_weights[FIRST:]) < 0.8 * scatter
    # The loss between a probe's two scatters, too, which makes it up to sqrt(3) times too wide.
    assert scatter < median(errors[FIRST:]) < 2 * scatter
    variance = estimator.state_dict()["input_variance"]
    assert math.sqrt(variance) == pytest.approx(scatter, rel=0.7)


def test_inputs_of_8_bits_hardly_change_it():
    _, _, of_weights = train(network(None))
    _, _, errors = train(network(fogzo.lsq(8)))
    assert median(errors[FIRST:]) < 2 * median(of_weights[FIRST:])


@pytest.mark.parametrize(
    "options", [{"expects": False}, {"one_sided": True}], ids=["no loss to expect", "one-sided"]
)
@pytest.mark.parametrize("samples", [1, 4])
def test_steps_tell_it_where_one_probe_does_not(options, samples):
    _, _, of_weights = train(network(None), num_samples=samples, **options)
    estimator, agreements, errors = train(network(fogzo.lsq(2)), num_samples=samples, **options)
    scatter = stdev(agreements[FIRST:])
    assert median(of_weights[FIRST:]) < 0.8 * scatter
    assert 0.7 * scatter < median(errors[FIRST:]) < 1.5 * scatter
    assert estimator.state_dict()["last_agreement"] == agreements[-1]
    first, *_ = train(network(fogzo.lsq(2)), 1, num_samples=samples, **options)
    assert set(first.state_dict()) == {"step", "seed", "last_agreement"}  # one step tells nothing


@pytest.mark.parametrize("options", [{"expects": False}, {"one_sided": True}])
def test_what_weights_explain_is_not_counted_twice(options):
    _, _, of_weights = train(network(None), **options)
    _, _, errors = train(network(fogzo.lsq(8)), **options)  # whose rounding adds next to nothing
    assert median(errors[FIRST:]) < 1.2 * median(of_weights[FIRST:])


@pytest.mark.parametrize("expects", [True, False])
def test_a_resumed_run_knows_it(expects):
    first, *_ = train(network(fogzo.lsq(2)), steps=5, expects=expects)
    saved = first.state_dict()
    keys = {"step", "seed", "input_variance", *({"last_agreement"} if not expects else ())}
    assert set(saved) == keys
    model = network(fogzo.lsq(2))
    second = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    second.load_state_dict({"step": 1, "seed": 0})  # of a version that did not know it
    assert second.state_dict() == {"step": 1, "seed": 0}
    second.load_state_dict(saved)
    assert second.state_dict() == saved
    runs = []
    for estimator in (first, second):
        model = network(fogzo.lsq(2))
        fresh = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
        fresh.load_state_dict(estimator.state_dict())
        runs.append(train(model, 3, fresh, expects)[1:])
    assert runs[0] == runs[1]
    for wrong in ("0.3", math.nan):
        with pytest.raises(ValueError, match="input_variance must be a finite number, got"):
            second.load_state_dict({**saved, "input_variance": wrong})
    with pytest.raises(ValueError, match="last_agreement must be a finite number, got inf"):
        second.load_state_dict({**saved, "last_agreement": math.inf})
    with pytest.raises(ValueError, match=r"expected two integers, .* got 'latest"):
        second.load_state_dict("latest.pt")
    assert second.state_dict() == saved
