"""The linearized loss: what probes measure to first order, without a forward pass."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo
from toolbox import (
    EVERY_PRESET,
    PRESETS,
    Snapshot,
    backward,
    batch,
    draw,
    everything,
    fill,
    quantized_net,
)

OPTIONS = {"noise_share": 0.3, "agreement": "measured"}


def estimator_of(model, **options):
    return fogzo.FogzoEstimator(fogzo.quantized_weights(model), **OPTIONS | options)


@EVERY_PRESET
def test_it_is_the_loss_itself_where_that_is_linear(preset):
    layer = fogzo.quantize_(fill(nn.Linear(8, 8)), PRESETS[preset](), everything)
    x, direction = draw(4, 8, seed=1), draw(4, 8, seed=2)
    model = nn.Sequential(layer)
    linear = fogzo.LinearizedLoss(model)

    def loss_of():
        return (model(x) * direction).sum()

    found = []
    for closure in (loss_of, linear):
        model.zero_grad()
        backward(loss_of)
        estimator = estimator_of(model, num_samples=2)
        stats = estimator.refine_grads_(closure)
        found.append((stats.agreement, stats.fallback, layer.weight.grad.clone()))
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-4, atol=1e-6)


def classifier(bits=4, width=64):
    model = nn.Sequential(
        nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    )
    return fogzo.quantize_(fill(model, 0.2), fogzo.lsq(bits), everything)


def test_it_predicts_what_forward_passes_measure():
    model = classifier()
    linear, estimator = fogzo.LinearizedLoss(model), estimator_of(model)
    measured, predicted = [], []
    for seed in range(40):
        x = draw(32, 16, seed=seed)
        y = (x[:, :4]).argmax(dim=1)

        def loss_of(x=x, y=y):
            return cross_entropy(model(x), y)

        model.zero_grad()
        backward(loss_of)
        before = Snapshot(model)
        predicted.append(estimator.predicted_agreement(linear))
        before.assert_same()
        measured.append(estimator.refine_grads_(loss_of).agreement)
    both = torch.tensor([measured, predicted])
    assert torch.corrcoef(both)[0, 1] > 0.95
    assert both[0].std() > 0.02, "nothing varies that could be predicted"


@EVERY_PRESET
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_predicted_agreement_is_that_of_the_steps_own_probes(preset, one_sided):
    model = quantized_net(preset)
    linear, estimator = fogzo.LinearizedLoss(model), estimator_of(model, num_samples=3)
    x, y = batch()
    backward(lambda: (model(x) - y).square().mean())
    predicted = estimator_of(model, num_samples=3, one_sided=one_sided).predicted_agreement(linear)
    assert predicted == estimator.refine_grads_(linear).agreement
    assert predicted not in (None, 1.0)


def test_where_nothing_is_measured_nothing_is_predicted():
    model = quantized_net("lsq", dropout=0.0)
    linear, weights = fogzo.LinearizedLoss(model), fogzo.quantized_weights(model)
    x, y = batch()
    backward(lambda: (model(x) - y).square().mean())
    assert fogzo.PlaceboEstimator(weights).predicted_agreement(linear) is None
    skips = fogzo.FogzoEstimator(weights, noise_share=lambda step: None)
    assert skips.predicted_agreement(linear) is None
    for weight in weights:
        weight.param.grad.zero_()
    assert fogzo.FogzoEstimator(weights).predicted_agreement(linear) is None


def test_it_sees_the_gradients_that_the_surrogate_masks():
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1] * 7 + [100.0]]))
    model = nn.Sequential(layer)
    fogzo.quantize_(model, fogzo.fixed(2, init="abs_mean", surrogate="identity"), everything)
    linear, x = fogzo.LinearizedLoss(model), torch.arange(8.0)
    model(x).sum().backward()
    assert layer.weight.grad.tolist() == [[*x[:7].tolist(), 0.0]]
    assert linear().item() == pytest.approx(model(x).item())


@pytest.mark.parametrize("fused", [False, True])  # which counts no version of what it changes
def test_backward_passes_of_a_step_add_up_and_the_next_step_begins_anew(fused):
    model = quantized_net("lsq", dropout=0.0)
    linear = fogzo.LinearizedLoss(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    x, y = batch()

    def loss_of(rows):
        return (model(x[rows]) - y[rows]).square().mean()

    model.eval()
    backward(lambda: loss_of(slice(None)) * 2)
    whole = linear().item()
    backward(lambda: loss_of(slice(0, 8)))
    backward(lambda: loss_of(slice(8, 16)))
    assert linear().item() == pytest.approx(whole, rel=1e-5)
    # Not probed, but the weights have moved on.
    backward(lambda: loss_of(slice(None)))
    optimizer.step()
    backward(lambda: loss_of(slice(None)) * 2)
    again = linear().item()
    backward(lambda: loss_of(slice(None)) * 2)
    assert linear().item() == pytest.approx(again, rel=1e-6)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_batch_that_was_dropped_is_forgotten(set_to_none):
    model = quantized_net("lsq", dropout=0.0).eval()
    linear, (x, y) = fogzo.LinearizedLoss(model), batch()

    def loss():
        return (model(x) - y).square().mean()

    backward(loss)
    expected = linear().item()
    backward(lambda: loss() * torch.inf)  # as a GradScaler's that overflows, whose step is skipped
    model.zero_grad(set_to_none)
    backward(loss)
    model.zero_grad(set_to_none)
    backward(loss)
    assert linear().item() == pytest.approx(expected, rel=1e-6)


def test_a_probe_gives_everything_back_and_copies_know_nothing_of_it():
    model = quantized_net("lsq")
    linear = fogzo.LinearizedLoss(model)
    x, y = batch()
    backward(lambda: (model(x) - y).square().mean())
    before = Snapshot(model)
    estimator_of(model).refine_grads_(linear)
    before.assert_same(rewritten={"first.weight", "second.weight"})
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.first.observe_quantized_weight is None
        fogzo.LinearizedLoss(other)
    linear.close()
    fogzo.LinearizedLoss(model)
    fogzo.dequantize_(model)
    assert not hasattr(model.first, "observe_quantized_weight")
    fogzo.LinearizedLoss(fogzo.quantize_(model, fogzo.lsq(2), everything))


def test_what_it_cannot_know_is_refused():
    with pytest.raises(ValueError, match="no quantized layers"):
        fogzo.LinearizedLoss(nn.Linear(2, 2))
    model = quantized_net()
    linear = fogzo.LinearizedLoss(model)
    with pytest.raises(ValueError, match="no gradient has reached the rounded weights"):
        linear()
    with pytest.raises(ValueError, match="has a LinearizedLoss already"):
        fogzo.LinearizedLoss(model)
