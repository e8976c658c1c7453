"""Where nothing can be measured the gradient stays as it is, and the step says why."""

import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo

NO_FLIP = "no weight rounds differently between the probes"
NO_EFFECT = "the probes do not change the loss"
ESTIMATORS = {
    "fogzo": lambda w, **o: fogzo.FogzoEstimator(w, **o),
    "fogzo to the letter": lambda w, **o: fogzo.FogzoEstimator(
        w, agreement="measured", noise_shape="isotropic", **o
    ),
    "lambda only": lambda w, **o: fogzo.FogzoEstimator(w, noise_share=0.0, **o),
    "one-sided": lambda w, **o: fogzo.FogzoEstimator(w, one_sided=True, **o),
    "lean": lambda w, **o: fogzo.FogzoEstimator(w, evaluate="lean", **o),
    "stacked": lambda w, **o: fogzo.FogzoEstimator(w, num_samples=2, evaluate="stacked", **o),
}
PRESETS = {
    "fixed": lambda: fogzo.fixed(4),
    "lsq": lambda: fogzo.lsq(4),
    "lsq per channel": lambda: fogzo.lsq(4, granularity="channel"),
}


def classification(seed=0, count=256, classes=4):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=stream)
    return x, (x @ torch.randn(16, classes, generator=stream)).argmax(1)


def network(quantizer=None, seed=0, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
    return model if quantizer is None else fogzo.quantize_(model, quantizer)


def gradients(weights):
    return [w.param.grad.clone() for w in weights]


def assert_kept(weights, before):
    for weight, grad in zip(weights, before, strict=True):
        assert torch.equal(weight.param.grad, grad)


def on_their_levels(quantizer):
    """A network whose latent weights lie on their levels, as after dequantize_ and a new start."""
    model = network(quantizer)
    with torch.no_grad():
        for weight in fogzo.quantized_weights(model):
            layer = model.get_submodule(weight.name.removesuffix(".weight"))
            if layer.quantizer.rotation is None:
                layer.weight.copy_(layer.quantized_weight())
    return model


@pytest.mark.parametrize(
    ("estimator", "preset"),
    [*zip(ESTIMATORS, itertools.cycle(PRESETS)), ("fogzo", "lsq"), ("fogzo", "lsq per channel")],
)
def test_weights_on_their_levels_train_as_without_an_estimator(preset, estimator):
    x, y = classification()
    losses, reasons = {}, set()
    for refine in (False, True):
        model = on_their_levels(PRESETS[preset]())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        weights = fogzo.quantized_weights(model)
        # So little noise that no weight leaves its level's surroundings.
        share = 0.0 if estimator == "lambda only" else 1e-9
        options = {} if estimator == "lambda only" else {"noise_share": share}
        instance = ESTIMATORS[estimator](weights, **options)
        told = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(30):
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                if refine:
                    before = gradients(weights)
                    stats = instance.refine_grads_(
                        lambda m=model: cross_entropy(m(x), y), expected_loss=loss.detach()
                    )
                    if step == 0:
                        assert stats.fallback == NO_FLIP
                    if stats.fallback is not None:
                        reasons.add(stats.fallback)
                        assert_kept(weights, before)
                optimizer.step()
            told = [str(w.message) for w in caught]
        assert sum("no weight rounds differently" in text for text in told) == refine
        losses[refine] = cross_entropy(model(x), y).item()
    assert NO_FLIP in reasons
    assert losses[True] < 0.9 * math.log(4)
    if estimator != "fogzo to the letter":  # its agreement of few roundings is anything
        assert losses[True] == pytest.approx(losses[False], rel=0.2, abs=0.1)


@pytest.mark.parametrize("estimator", [fogzo.FogzoEstimator, fogzo.PlaceboEstimator])
def test_latent_weights_in_16_bits_are_told_once(estimator):
    x, y = classification()
    model = network(fogzo.lsq(2)).bfloat16()
    instance = estimator(fogzo.quantized_weights(model))

    def closure():
        return cross_entropy(model(x.bfloat16()).float(), y)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.zero_grad()
            closure().backward()
            instance.refine_grads_(closure)
    told = [str(w.message) for w in caught if "16 bits" in str(w.message)]
    assert len(told) == 1
    assert "model.float()" in told[0]


@pytest.mark.parametrize(
    ("dtype", "afterwards"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
def test_a_loss_of_few_digits_is_told_once_and_never_believed(dtype, afterwards):
    x, y = classification()
    model = network(fogzo.lsq(2))
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights)

    def closure():
        loss = cross_entropy(model(x), y).to(dtype)
        return loss.float() if afterwards else loss

    fallbacks = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            before = gradients(weights)
            stats = estimator.refine_grads_(closure)
            if stats.fallback is not None:
                fallbacks += 1
                assert_kept(weights, before)
    assert fallbacks or dtype == torch.float16  # whose ten bits are often enough
    told = [str(w.message) for w in caught]
    assert all("logits.float()" in text or NO_EFFECT in text for text in told)
    assert 1 <= len(told) <= 3
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("gate", [1e-6, 1e-8, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_tiny_gate_hides_what_its_weights_do(gate, seed):
    # LayerScale, an adapter or a residual branch that starts at (nearly) nothing.
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = (
                nn.Linear(16, 16),
                nn.Linear(16, 16),
                nn.Linear(16, 4),
            )
            self.gate = nn.Parameter(torch.full((16,), gate))

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(x + self.gate * self.branch(x))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Gated()
    x, y = classification(seed)
    fogzo.quantize_(model, fogzo.lsq(2), filter_fn=lambda m, name: name == "branch")
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights)
    for _ in range(4):
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        before = gradients(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss=loss)
        assert stats.fallback is not None
        assert_kept(weights, before)


def test_an_adapter_that_starts_at_zero_is_no_mistake():
    # The low-rank product B A with B = 0: the loss does not depend on A yet.
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(16, 4).requires_grad_(False)
            self.a, self.b = nn.Linear(16, 8, bias=False), nn.Linear(8, 4, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = LowRank()
    x, y = classification()
    fogzo.quantize_(model, fogzo.lsq(2), filter_fn=lambda m, name: name == "a")
    estimators = [fogzo.FogzoEstimator, fogzo.SpsaEstimator, fogzo.ControlVariateEstimator]
    for cls in estimators:
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = cls(fogzo.quantized_weights(model)).refine_grads_(
                lambda: cross_entropy(model(x), y)
            )
        assert stats.fallback is not None
        assert (model.a.weight.grad == 0).all()


def test_the_report_of_a_fallback_comes_from_each_cause_alone():
    x, y = classification()
    model = network(fogzo.lsq(2))
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights)
    loss = cross_entropy(model(x), y)
    loss.backward()
    stats = estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss=loss)
    assert stats.fallback is None
    assert stats.agreement_error > 0
