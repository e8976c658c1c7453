"""Weights that must not move do not: frozen ones, padding, those without gradient, dead groups."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import fogzo
from toolbox import PRESETS, WAYS, pairwise

ESTIMATORS = {
    "fogzo": fogzo.FogzoEstimator,
    "placebo": fogzo.PlaceboEstimator,
    "control variate": fogzo.ControlVariateEstimator,
    "spsa": fogzo.SpsaEstimator,
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:(no weight rounds|the probes|the step size of every):RuntimeWarning"
)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 3))


def options_of(name):
    return {"noise_share": 0.3} if name in ("fogzo", "placebo") else {}


@pairwise(name=ESTIMATORS, shape=["isotropic", "tensor_rms"], evaluate=WAYS)
def test_frozen_weights_are_left_alone(name, shape, evaluate):
    if (name, shape) == ("spsa", "tensor_rms"):
        pytest.skip("SPSA has no gradient to shape its noise by, and says so")
    model = fogzo.quantize_(network(), fogzo.lsq(2))
    model[0].weight.requires_grad_(False)
    estimator = ESTIMATORS[name](
        fogzo.quantized_weights(model),
        noise_shape=shape,
        evaluate=evaluate,
        **options_of(name),
    )
    assert estimator.num_weights == model[2].weight.numel()
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    seen = []

    def closure():
        seen.append(model[0].weight.detach().clone())
        return cross_entropy(model(x), y)

    cross_entropy(model(x), y).backward()
    estimator.refine_grads_(closure)
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    assert all(torch.equal(w, model[0].weight) for w in seen)


def test_if_all_are_frozen_the_error_says_so():
    model = fogzo.quantize_(network(), fogzo.lsq(2)).requires_grad_(False)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    with pytest.raises(ValueError, match=r"all frozen: model\.requires_grad_\(True\)"):
        estimator.refine_grads_(lambda: model(torch.ones(1, 8)).sum())


@pairwise(
    name=["fogzo", "placebo", "control variate"],
    granularity=["tensor", "channel"],
    shape=["isotropic", "tensor_rms"],
)
def test_padding_rows_keep_their_values_and_gradients(name, granularity, shape):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4, padding_idx=3)
            self.head = nn.Linear(4, 2)
            with torch.no_grad():
                self.embedding.weight[3] = 0.3  # whatever it is, it stays

        def forward(self, tokens):
            return self.head(self.embedding(tokens).mean(1))

    model = Bag()
    quantizer = fogzo.lsq(2, granularity=granularity)
    fogzo.quantize_(model, quantizer, filter_fn=lambda m, n: n == "embedding")
    tokens, y = torch.randint(10, (64, 5)), torch.randn(64, 2)
    estimator = ESTIMATORS[name](
        fogzo.quantized_weights(model), noise_shape=shape, **options_of(name)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    row = model.embedding.weight[3].detach().clone()
    others = model.embedding.weight.detach().clone()

    def closure():
        assert torch.equal(model.embedding.weight[3], row)
        return mse_loss(model(tokens), y)

    for _ in range(3):
        optimizer.zero_grad()
        closure().backward()
        estimator.refine_grads_(closure)
        assert (model.embedding.weight.grad[3] == 0).all()
        optimizer.step()
    assert torch.equal(model.embedding.weight[3], row)
    assert not torch.equal(model.embedding.weight, others)


@pytest.mark.parametrize("shape", ["isotropic", "tensor_rms"])
@pytest.mark.parametrize("name", ["fogzo", "placebo", "control variate"])
def test_a_tensor_whose_gradient_is_zero_gets_no_noise(name, shape):
    # An expert that no token was sent to, after zero_grad(set_to_none=False).
    model = fogzo.quantize_(network(), fogzo.lsq(2))
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    estimator = ESTIMATORS[name](
        fogzo.quantized_weights(model), noise_shape=shape, **options_of(name)
    )
    cross_entropy(model(x), y).backward()
    model[0].weight.grad.zero_()
    unused = model[0].weight.detach().clone()

    def closure():
        assert torch.equal(model[0].weight, unused)
        return cross_entropy(model(x), y)

    estimator.refine_grads_(closure)
    assert (model[0].weight.grad == 0).all()
    assert (model[2].weight.grad != 0).any()


def test_masked_weights_of_a_trained_tensor_keep_their_noise():
    # That is what revives them.
    model = fogzo.quantize_(network(), fogzo.fixed(2, step_size=0.05, surrogate="identity"))
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    cross_entropy(model(x), y).backward()
    masked = model[2].weight.grad == 0
    assert masked.any()
    fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3).refine_grads_(
        lambda: cross_entropy(model(x), y)
    )
    assert (model[2].weight.grad[masked] != 0).all()


# Dead groups


DEAD_GROUPS = {name: PRESETS[name] for name in ("fixed", "quest", "ternary", "sign")} | {
    "fixed per channel": lambda: fogzo.fixed(2, granularity="channel"),
    "lsq": lambda: fogzo.lsq(2, granularity="channel"),
    "lsq per group": lambda: fogzo.lsq(2, granularity=4),
    "lsq fp16": lambda: fogzo.lsq(2, granularity="channel", scale_dtype=torch.float16),
}


@pytest.mark.filterwarnings("ignore:no step size can be measured:UserWarning")
@pairwise(
    preset=DEAD_GROUPS,
    dead=["a row", "a layer"],
    shape=["isotropic", "tensor_rms"],
    optimizer=["sgd", "adamw"],
)
def test_dead_groups_neither_explode_nor_stop_the_others(preset, dead, shape, optimizer):
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(128, 8, generator=stream)
    y = (x @ torch.randn(8, 3, generator=stream)).argmax(1)
    losses, norms = {}, []
    for refine in (False, True):
        model = network()
        with torch.no_grad():
            (model[2].weight[1] if dead == "a row" else model[2].weight).zero_()
        fogzo.quantize_(model, DEAD_GROUPS[preset]())
        cls = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
        opt = cls(model.parameters(), lr={"sgd": 0.3, "adamw": 1e-2}[optimizer])
        estimator = fogzo.FogzoEstimator(
            fogzo.quantized_weights(model), noise_shape=shape, noise_share=1e-4
        )
        for _ in range(40):
            opt.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            if refine:
                estimator.refine_grads_(
                    lambda m=model: cross_entropy(m(x), y), expected_loss=loss.detach()
                )
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        losses[refine] = cross_entropy(model(x), y).item()
    assert max(norms) < 50
    assert losses[True] < losses[False] + 0.15
