"""One contract for every quantizer, surrogate, estimator and way to evaluate its probes."""

import copy
import dataclasses
import math
import pickle
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from fogzo.quantizers import SURROGATE_NAMES
from toolbox import ESTIMATORS, EVERY_PRESET, PRESETS, WAYS, draw, fill, pairwise

# By chance some of these 64 weights' measured slopes are tiny, which is warned about.
pytestmark = pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning")

X, Y = draw(12, 8, seed=1), draw(12, 3, seed=2)
D = 4 * 8 + 8 * 4


def mlp():
    """Two hidden layers and a head, the same at every call and without the global generator."""
    with torch.device("meta"):
        layers = [nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(8, 3, bias=False))
    return fill(model.to_empty(device=torch.get_default_device()), 0.5)


@cache
def prepared(preset, surrogate=None):
    """A quantized network after its backward pass, and what is needed to reset it."""
    options = {"surrogate": surrogate} if surrogate else {}
    model = fogzo.quantize_(mlp(), PRESETS[preset](**options))
    loss = mse_loss(model(X), Y)
    loss.backward()
    latent = [p.detach().clone() for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters()]
    return model, fogzo.quantized_weights(model), loss.detach(), latent, grads


def reset(model, latent, grads):
    with torch.no_grad():
        for p, value, grad in zip(model.parameters(), latent, grads, strict=True):
            p.copy_(value)
            p.grad = grad.clone()


@pairwise(estimator=ESTIMATORS, n=[1, 2], preset=PRESETS, surrogate=SURROGATE_NAMES, evaluate=WAYS)
def test_a_step_of_every_combination(estimator, n, preset, surrogate, evaluate):
    model, weights, loss, latent, grads = prepared(preset, surrogate)
    reset(model, latent, grads)
    make = ESTIMATORS[estimator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    instance = make(weights, num_samples=n, evaluate=evaluate)
    assert instance.num_weights == D
    is_fogzo = isinstance(instance, fogzo.FogzoEstimator)
    share = instance.noise_share(0) if is_fogzo else None
    count = 0 if estimator == "placebo" else n * (1 if instance.one_sided else 2)
    flips = instance.flip_rate()
    assert flips is None if count == 0 else 0 <= flips <= 1

    stats = instance.refine_grads_(lambda: mse_loss(model(X), Y), expected_loss=loss)

    # What was borrowed is back, and only the quantized weights have other gradients.
    quantized = {id(w.param) for w in weights}
    for p, value, grad in zip(model.parameters(), latent, grads, strict=True):
        assert torch.equal(p, value)
        assert p.grad.isfinite().all()
        if id(p) not in quantized:
            assert torch.equal(p.grad, grad)
    changed = any(
        not torch.equal(p.grad, grad)
        for p, grad in zip(model.parameters(), grads, strict=True)
        if id(p) in quantized
    )
    if stats.fallback is None:
        assert changed or stats.applied_agreement == 1
    else:  # so few weights that in some draws none flips
        assert stats.fallback == "no weight rounds differently between the probes"
        assert flips == 0 or n > 1
        assert not changed
        return

    check_stats(stats, count, n, share)
    if is_fogzo and count:
        assert type(stats.agreement) is type(stats.agreement_error) is float
        assert stats.agreement_error > 0
    else:
        assert stats.agreement is stats.agreement_error is None

    optimizer.step()
    for p, value in zip(model.parameters(), latent, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, value)

    other = make(weights, num_samples=n)
    other.load_state_dict(instance.state_dict())
    assert other.state_dict() == instance.state_dict() == {"step": 1, "seed": 0}


def check_stats(stats, count, n, share):
    assert (type(stats.step), stats.step) == (int, 0)
    assert stats.noise_share == share
    q = stats.noise_share
    assert stats.kappa == (None if q is None else pytest.approx(q * D / (n * (1 - q))))
    assert type(stats.probe_losses) is tuple
    assert len(stats.probe_losses) == count
    assert all(type(value) is float and math.isfinite(value) for value in stats.probe_losses)
    assert stats.gradient_norm is None or stats.gradient_norm > 0
    if stats.base_loss is not None:
        gaps = [2 * abs(value - stats.base_loss) for value in stats.probe_losses]
        assert stats.loss_gap == pytest.approx(sum(gaps) / len(gaps))
    elif count:
        plus, minus = stats.probe_losses[::2], stats.probe_losses[1::2]
        gaps = [abs(p - m) for p, m in zip(plus, minus, strict=True)]
        assert stats.loss_gap == pytest.approx(sum(gaps) / len(gaps))
    else:
        assert stats.loss_gap is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.step = 1


@EVERY_PRESET
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_flip_rate_counts_codes_that_differ_between_the_sides_of_the_first_probe(
    preset, one_sided
):
    model, weights, loss, latent, grads = prepared(preset)
    reset(model, latent, grads)
    seen = [[w.codes().clone() for w in weights]] if one_sided else []

    def closure():
        seen.append([w.codes().clone() for w in weights])
        return mse_loss(model(X), Y)

    estimator = fogzo.FogzoEstimator(
        weights, num_samples=2, noise_share=0.9, noise_shape="isotropic", one_sided=one_sided
    )
    rate = estimator.flip_rate()
    assert rate == estimator.flip_rate()
    estimator.refine_grads_(closure, expected_loss=loss if one_sided else None)
    if one_sided:
        del seen[1]  # of the audit
    flipped = sum(int((a != b).sum()) for a, b in zip(seen[0], seen[1], strict=True))
    assert flipped > 0
    assert rate == pytest.approx(flipped / D)


def test_where_nothing_is_measured_no_flips_are_counted():
    model, weights, _, latent, grads = prepared("lsq")
    reset(model, latent, grads)
    assert fogzo.PlaceboEstimator(weights).flip_rate() is None
    assert fogzo.FogzoEstimator(weights, noise_share=lambda step: None).flip_rate() is None
    for weight in weights:
        weight.param.grad.zero_()
    assert fogzo.FogzoEstimator(weights).flip_rate() is None
    reset(model, latent, grads)
    weights[0].param.grad.fill_(math.nan)
    assert fogzo.FogzoEstimator(weights).flip_rate() is None


def test_flips_are_those_of_the_step_that_follows():
    model, weights, _, latent, grads = prepared("lsq")
    estimator = fogzo.FogzoEstimator(weights, noise_share=0.5)
    rates = []
    for _ in range(4):
        reset(model, latent, grads)
        rates.append(estimator.flip_rate())
        estimator.refine_grads_(lambda: mse_loss(model(X), Y))
    assert len(set(rates)) > 1


@EVERY_PRESET
def test_a_resumed_run_continues_bit_for_bit(preset):
    # A checkpoint of model, optimizer and estimator is all that a run is.
    def start():
        model = fogzo.quantize_(mlp(), PRESETS[preset]())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, fogzo.FogzoEstimator(fogzo.quantized_weights(model))

    def train(model, optimizer, estimator):
        for _ in range(3):
            optimizer.zero_grad()
            mse_loss(model(X), Y).backward()
            estimator.refine_grads_(lambda: mse_loss(model(X), Y))
            optimizer.step()

    first = start()
    train(*first)
    second = start()
    for new, old in zip(second, first, strict=True):
        state = old.state_dict()
        new.load_state_dict(copy.deepcopy(state))
    train(*first)
    train(*second)
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pairwise(
    cls=[
        fogzo.FogzoEstimator,
        fogzo.PlaceboEstimator,
        fogzo.ControlVariateEstimator,
        fogzo.SpsaEstimator,
    ],
    preset=["fixed", "lsq", "quest"],
    evaluate=WAYS,
)
def test_an_estimator_can_be_sent_to_another_process_with_its_model(cls, preset, evaluate):
    model = fogzo.quantize_(mlp(), PRESETS[preset]())
    estimator = cls(fogzo.quantized_weights(model), seed=4, evaluate=evaluate)
    copies = pickle.loads(pickle.dumps((model, estimator)))
    grads = []
    for m, e in ((model, estimator), copies):
        mse_loss(m(X), Y).backward()
        e.refine_grads_(lambda m=m: mse_loss(m(X), Y))
        grads.append([p.grad for p in m.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# Somebody else's fake quantization


class HandWritten(torch.autograd.Function):
    """Two-bit rounding with the straight-through estimator clipped to the range."""

    @staticmethod
    def forward(ctx, weight, step):
        x = weight / step
        ctx.save_for_backward((x >= -1.5) & (x <= 1.5))
        return (torch.floor(x).clamp(-2, 1) + 0.5) * step

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None


class ForeignLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, HandWritten.apply(self.weight, self.step), self.bias)


def foreign_model():
    model = mlp()
    for layer in (model[0], model[2]):
        layer.__class__ = ForeignLinear
        layer.step = torch.tensor(0.25)
    return model


def as_numbers(model):
    return [(f"{i}.weight", model[i].weight, 0.25) for i in (0, 2)]


def as_tensors(model):
    return [(f"{i}.weight", model[i].weight, model[i].step) for i in (0, 2)]


def as_functions(model):
    return [(f"{i}.weight", model[i].weight, lambda i=i: model[i].step) for i in (0, 2)]


@pairwise(listed=[as_numbers, as_tensors, as_functions], estimator=ESTIMATORS)
def test_hand_written_fake_quantization_gives_what_an_attached_quantizer_gives(estimator, listed):
    results = []
    quantizer = fogzo.fixed(2, step_size=0.25, surrogate="identity")
    for model, weights_of in (
        (foreign_model(), listed),
        (fogzo.quantize_(mlp(), quantizer), fogzo.quantized_weights),
    ):
        weights = weights_of(model)
        instance = ESTIMATORS[estimator](weights)
        loss = mse_loss(model(X), Y)
        loss.backward()
        stats = instance.refine_grads_(
            lambda model=model: mse_loss(model(X), Y), expected_loss=loss
        )
        results.append((stats, [p.grad for p in model.parameters()]))
    (stats, grads), (expected_stats, expected) = results
    assert stats == expected_stats
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)
