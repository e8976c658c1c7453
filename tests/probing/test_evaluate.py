"""Every way to evaluate probes gives the step that moving the weights in place gives."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import fogzo
from fogzo.estimators.reference import fogzo_gradient
from toolbox import (
    ESTIMATORS,
    IN_16_BITS,
    PRESETS,
    WAYS,
    Net,
    fill,
    in_chunks_of,
    pairwise,
    streams_put_back,
)

# By chance some of these small networks' measured slopes are tiny, which is warned about.
pytestmark = pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning")

QUANTIZERS = PRESETS | {"stochastic": lambda: replace(fogzo.lsq(2), stochastic=True)}
ACTIVATIONS = {
    "float": lambda: None,
    "lsq": lambda: fogzo.lsq(2),
    "per token": lambda: fogzo.abs_max(8, granularity="token"),
    "quest": lambda: fogzo.quest(4),
}
PROBING = [name for name in ESTIMATORS if name != "placebo"]
OTHER_WAYS = [way for way in WAYS if way != "in_place"]


class Images(nn.Module):
    """Convolutions, one of them transposed, batch statistics of images, and dropped channels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout2d(0.3),
            nn.Conv2d(4, 4, 2, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 2),
            nn.Flatten(),
            nn.Linear(2 * 5 * 5, 3),
        )

    def forward(self, x):
        return self.layers(x.reshape(-1, 2, 4, 4))


class Tied(nn.Module):
    """One weight in two layers, applied to sequences, where attention mixes positions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        h = self.norm(self.first(x.reshape(-1, 4, 8)).relu())
        h = nn.functional.scaled_dot_product_attention(h, h, self.second(h))
        return self.head(h.mean(1))


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.head(self.twice(self.dropout(self.twice(self.first(x)).relu())))


MODELS = {Net: (12, 8), Images: (6, 32), Tied: (6, 32), Twice: (12, 8)}


@pytest.fixture(autouse=True)
def _clean_streams():
    with streams_put_back(seed=0):
        yield


def prepared(make=Net, preset="lsq", activations="float", dtype=torch.float32):
    """A quantized network and its loss on one batch."""
    with streams_put_back(seed=0):
        model = fill(make()).to(dtype)
        x = torch.randn(MODELS.get(make, (12, 8)), dtype=dtype)
        y = torch.randint(3, (len(x),))
        fogzo.quantize_(model, QUANTIZERS[preset](), activations=ACTIVATIONS[activations]())
        model(x)  # measures the steps of activations
    return model, lambda: cross_entropy(model(x).float(), y)


def step_of(model, loss_of, make, evaluate, n=5, **options):
    """The statistics of one step, the flips of its first probe, and the gradients it leaves."""
    model.zero_grad()
    weights = fogzo.quantized_weights(model)
    estimator = make(weights, num_samples=n, evaluate=evaluate, **options)
    with streams_put_back(seed=1):
        with estimator.record_rng():
            loss = loss_of()
        loss.backward()
        flips = estimator.flip_rate()
        stats = estimator.refine_grads_(loss_of, expected_loss=loss)
    return stats, flips, [p.grad for p in model.parameters()]


def assert_same_step(expected, found, evaluate):
    (stats, flips, grads), (other, other_flips, other_grads) = expected, found
    assert stats.fallback is None
    assert len(set(stats.probe_losses)) > 1
    assert other_flips == flips
    if evaluate == "lean":
        assert other == stats
        for grad, its in zip(grads, other_grads, strict=True):
            assert torch.equal(grad, its)
        return
    # Slopes are differences of losses, so their rounding errors are the losses'.
    scale = max(map(abs, stats.probe_losses))
    assert other.probe_losses == pytest.approx(stats.probe_losses, abs=1e-5 * scale)
    assert other.gradient_norm == stats.gradient_norm
    for grad, its in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(its, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())


def assert_equals_in_place(model, loss_of, evaluate, make=ESTIMATORS["fogzo"], **options):
    expected = step_of(model, loss_of, make, "in_place", **options)
    assert_same_step(expected, step_of(model, loss_of, make, evaluate, **options), evaluate)


@pairwise(
    make=MODELS,
    preset=[name for name in QUANTIZERS if name != "stochastic"],
    activations=ACTIVATIONS,
    estimator=PROBING,
    evaluate=OTHER_WAYS,
)
def test_every_network_quantizer_and_estimator(make, preset, activations, estimator, evaluate):
    model, loss_of = prepared(make, preset, activations)
    assert_equals_in_place(model, loss_of, evaluate, ESTIMATORS[estimator])


@pytest.mark.parametrize("evaluate", OTHER_WAYS)
def test_stochastic_rounding(evaluate):
    assert_equals_in_place(*prepared(preset="stochastic"), evaluate)


@IN_16_BITS
@pairwise(preset=["lsq", "quest", "ternary"], estimator=PROBING)
def test_lean_is_in_place_to_the_bit_in_bfloat16_too(preset, estimator):
    model, loss_of = prepared(Twice, preset, dtype=torch.bfloat16)
    assert_equals_in_place(model, loss_of, "lean", ESTIMATORS[estimator])


@pairwise(
    norm=[nn.BatchNorm1d, nn.LayerNorm, nn.Identity], training=[True, False], evaluate=OTHER_WAYS
)
def test_norms_in_both_modes(norm, training, evaluate):
    model, loss_of = prepared(lambda: Net(norm=norm))
    assert_equals_in_place(model.train(training), loss_of, evaluate)


@pytest.mark.parametrize("evaluate", OTHER_WAYS)
def test_instance_norm_that_tracks_statistics(evaluate):
    model, loss_of = prepared(Images)
    model.layers[5] = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    assert_equals_in_place(model, loss_of, evaluate)


def test_a_regulariser_that_reads_the_latent_weights_sees_the_stacked_ones():
    model, loss_of = prepared(lambda: Net(dropout=0.0))

    def decayed():
        return loss_of() + sum(p.square().sum() for p in model.parameters())

    assert_equals_in_place(model, decayed, "stacked")


class OwnLinear(nn.Linear):
    def forward(self, x):
        step = torch.tensor(0.25)
        rounded = ((self.weight / step).floor().clamp(-2, 1) + 0.5) * step
        weight = self.weight + (rounded - self.weight).detach()
        return nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("evaluate", OTHER_WAYS)
def test_hand_written_triples_work_if_their_model_is_named(evaluate):
    model = fill(nn.Sequential(OwnLinear(4, 3), nn.Tanh(), OwnLinear(3, 2)))
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    triples = [(f"{i}.weight", model[i].weight, 0.25) for i in (0, 2)]
    results = []
    for way in ("in_place", evaluate):
        model.zero_grad()
        mse_loss(model(x), y).backward()
        estimator = fogzo.FogzoEstimator(
            triples, num_samples=3, noise_share=0.2, model=model, evaluate=way
        )
        assert estimator.flip_rate() is None  # nobody tells the codes
        stats = estimator.refine_grads_(lambda: mse_loss(model(x), y))
        results.append((stats, None, [param.grad for _, param, _ in triples]))
    assert_same_step(*results, evaluate)


@pytest.mark.parametrize("evaluate", WAYS)
def test_a_whole_step_is_that_of_the_reference(evaluate, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    fill(model.double(), 0.5)
    fogzo.quantize_(model, fogzo.fixed(2, step_size=0.3), lambda *_: True)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    weights, q, n = fogzo.quantized_weights(model), 0.2, 5
    in_chunks_of(2, monkeypatch, weights)
    mse_loss(model(x), y).backward()
    g = [w.param.grad.clone() for w in weights]
    quantizer = model[0].quantizer

    def L(theta):
        first, second = (quantizer(t, torch.full((1, 1), 0.3, dtype=t.dtype)) for t in theta)
        return mse_loss((x @ first.T).tanh() @ second.T, y)

    estimator = fogzo.FogzoEstimator(
        weights,
        num_samples=n,
        noise_share=q,
        evaluate=evaluate,
        agreement="measured",
        noise_shape="isotropic",
    )
    drawn = {}
    plan = estimator.plan

    def spy(share, directions):
        drawn["s"] = [directions.sign(i) for i in range(n)]
        drawn["u"] = [[directions.noise(i, k).clone() for k in range(2)] for i in range(n)]
        return plan(share, directions)

    estimator.plan = spy
    estimator.refine_grads_(lambda: mse_loss(model(x), y))
    with torch.no_grad():
        theta = [w.param.detach() for w in weights]
        eps = [w.step_size() * w.surrogate.radius for w in weights]
        expected = fogzo_gradient(L, theta, g, eps, q, **drawn)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.param.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("evaluate", OTHER_WAYS)
def test_a_run_of_several_steps_takes_the_same_path(evaluate, monkeypatch):
    paths = []
    for way in ("in_place", evaluate):
        model, loss_of = prepared()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        weights = fogzo.quantized_weights(model)
        in_chunks_of(3, monkeypatch, weights)
        estimator = fogzo.FogzoEstimator(weights, num_samples=4, evaluate=way)
        with streams_put_back(seed=1):
            for _ in range(4):
                optimizer.zero_grad()
                with estimator.record_rng():
                    loss = loss_of()
                loss.backward()
                estimator.refine_grads_(loss_of, expected_loss=loss)
                optimizer.step()
        paths.append(torch.cat([v.flatten().double() for v in model.state_dict().values()]))
    torch.testing.assert_close(*paths, rtol=1e-4, atol=1e-5)


# Mistakes


@pytest.mark.parametrize("value", ["all", None, True, 2, ["lean"]])
def test_a_way_that_is_none_is_refused_with_those_that_exist(value):
    model, _ = prepared()
    with pytest.raises(ValueError, match="in_place, stacked, lean, got"):
        fogzo.FogzoEstimator(fogzo.quantized_weights(model), evaluate=value)


@pytest.mark.parametrize("evaluate", OTHER_WAYS)
@pytest.mark.parametrize("named", [None, nn.Linear(4, 3)])
def test_hand_written_triples_without_their_model_are_refused(named, evaluate):
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match='model=model, or use evaluate="in_place"'):
        fogzo.FogzoEstimator([("w", layer.weight, 0.5)], model=named, evaluate=evaluate)


@pytest.mark.parametrize("evaluate", OTHER_WAYS)
def test_sharded_weights_are_refused(evaluate, monkeypatch):
    # As if FSDP had cut them, which test_sharded.py does with two processes.
    monkeypatch.setattr("fogzo.probing.measure.is_sharded", lambda param: True)
    model, _ = prepared()
    with pytest.raises(ValueError, match=r'is sharded.*evaluate="in_place" copies one shard'):
        fogzo.FogzoEstimator(fogzo.quantized_weights(model), evaluate=evaluate)
    fogzo.FogzoEstimator(fogzo.quantized_weights(model))
