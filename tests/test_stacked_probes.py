"""Probes evaluated many at once give what the loop over them gives, and everything back."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import fogzo
from fogzo.estimators.reference import fogzo_gradient
from fogzo.probing.directions import Directions, Probe
from fogzo.probing.stacked import chunk_size

# By chance some of these small networks' measured slopes are tiny, which is warned about.
pytestmark = pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning")

PRESETS = {
    "fixed": lambda: fogzo.fixed(2),
    "fixed per channel": lambda: fogzo.fixed(4, granularity="channel"),
    "lsq": lambda: fogzo.lsq(2),
    "lsq per group": lambda: fogzo.lsq(3, granularity=4),
    "quest": lambda: fogzo.quest(2),
    "ternary": lambda: fogzo.ternary(),
    "ternary per channel": lambda: fogzo.ternary(granularity="channel"),
    "sign": lambda: fogzo.sign(),
    "stochastic": lambda: replace(fogzo.lsq(2), stochastic=True),
}
ACTIVATIONS = {
    "float": lambda: None,
    "lsq": lambda: fogzo.lsq(2),
    "per token": lambda: fogzo.abs_max(8, granularity="token"),
    "quest": lambda: fogzo.quest(4),
}
ESTIMATORS = {
    "fogzo": lambda w, **o: fogzo.FogzoEstimator(w, noise_share=0.1, **o),
    "lambda only": lambda w, **o: fogzo.FogzoEstimator(w, noise_share=0.0, **o),
    "paired": lambda w, **o: fogzo.FogzoEstimator(w, noise_share=0.1, paired=True, **o),
    "spsa": lambda w, **o: fogzo.SpsaEstimator(w, **o),
    "control variate": lambda w, **o: fogzo.ControlVariateEstimator(w, **o),
}


class Net(nn.Module):
    """Layers that share an input and layers that do not, dropout and batch statistics."""

    def __init__(self, dropout=0.3, norm=nn.BatchNorm1d):
        super().__init__()
        self.before = nn.Dropout(dropout)
        self.first = nn.Linear(8, 8)
        self.norm = norm(8)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        h = self.dropout(self.norm(self.first(self.before(x))).tanh())
        return self.head(self.second(h).tanh())


class Images(nn.Module):
    """Convolutions, one of them transposed, batch statistics of images, and dropped channels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout2d(0.3),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 2),
            nn.Flatten(),
            nn.Linear(2 * 3 * 3, 3),
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


SHAPES = {Net: (12, 8), Images: (6, 32), Tied: (6, 32)}


@pytest.fixture(autouse=True)
def _streams_put_back():
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def prepared(cls=Net, preset="lsq", activations="float", **options):
    """A quantized network and its loss on one batch."""
    torch.manual_seed(0)
    model = cls(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    x = torch.randn(SHAPES[cls])
    y = torch.randint(3, (len(x),))
    fogzo.quantize_(model, PRESETS[preset](), activations=ACTIVATIONS[activations]())
    model(x)  # measures the steps of activations
    return model, lambda: cross_entropy(model(x), y)


def refined(model, loss_of, make, at_once, closure=None, n=5, **options):
    """One step of an estimator: its statistics and the gradients it leaves."""
    model.zero_grad()
    weights = fogzo.quantized_weights(model)
    estimator = make(weights, num_samples=n, probes_at_once=at_once, **options)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with estimator.record_rng():
        loss = loss_of()
    loss.backward()
    stats = estimator.refine_grads_(closure or loss_of, expected_loss=loss)
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    np.random.set_state(before[2])
    return stats, [w.param.grad.clone() for w in weights]


def assert_same_step(one, other, tolerance=1e-5):
    (stats, grads), (other_stats, other_grads) = one, other
    assert stats.fallback is None
    scale = max(map(abs, stats.probe_losses))
    assert other_stats.probe_losses == pytest.approx(stats.probe_losses, abs=tolerance * scale)
    assert len(set(stats.probe_losses)) > 1
    # Slopes are differences of losses, so their rounding errors are the losses'.
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(other, grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item())
    assert other_stats.flip_rate == stats.flip_rate
    assert other_stats.gradient_norm == stats.gradient_norm


def assert_at_once_equals_the_loop(model, loss_of, make=ESTIMATORS["fogzo"], at_once=2, **options):
    loop = refined(model, loss_of, make, 1, **options)
    assert_same_step(loop, refined(model, loss_of, make, at_once, **options))


# The same step as the loop


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_and_quantizer(estimator, preset):
    model, loss_of = prepared(preset=preset)
    assert_at_once_equals_the_loop(model, loss_of, ESTIMATORS[estimator])


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("preset", ["fixed", "lsq", "ternary"])
@pytest.mark.parametrize("cls", [Images, Tied])
def test_convolutions_ties_and_quantized_activations(cls, preset, activations):
    assert_at_once_equals_the_loop(*prepared(cls, preset, activations))


@pytest.mark.parametrize("at_once", [2, 3, 5, 6, 100, "auto"])
@pytest.mark.parametrize("n", [1, 5, 6])
def test_chunks_of_any_size(n, at_once):
    model, loss_of = prepared()
    assert_at_once_equals_the_loop(model, loss_of, at_once=at_once, n=n)
    assert_at_once_equals_the_loop(model, loss_of, ESTIMATORS["paired"], at_once=at_once, n=n)


@pytest.mark.parametrize(
    "options",
    [
        {"coordinates": "global"},
        {"noise_shape": "tensor_rms"},
        {"track_flips": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["lsq", "quest"])
def test_every_option(preset, options):
    model, loss_of = prepared(preset=preset)
    assert_at_once_equals_the_loop(model, loss_of, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.Identity])
def test_norms_in_both_modes(norm, training):
    model, loss_of = prepared(norm=norm)
    model.train(training)
    assert_at_once_equals_the_loop(model, loss_of)


def test_instance_norm_that_tracks_statistics():
    model, loss_of = prepared(Images)
    model.layers[5] = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    assert_at_once_equals_the_loop(model, loss_of)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model, _ = prepared(dropout=0.0)
    model.to(dtype)
    x, y = torch.randn(12, 8, dtype=dtype), torch.randn(12, 3, dtype=dtype)

    def loss_of():
        return mse_loss(model(x).double(), y.double())

    loop, stacked = (refined(model, loss_of, ESTIMATORS["fogzo"], k) for k in (1, 2))
    rounding = torch.finfo(dtype).eps
    assert stacked[0].probe_losses == pytest.approx(loop[0].probe_losses, rel=8 * rounding)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_autocast_inside_the_closure(norm):
    model, loss_of = prepared(norm=norm)

    def cast():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of()

    loop, stacked = (refined(model, cast, ESTIMATORS["fogzo"], k) for k in (1, 2))
    assert stacked[0].probe_losses == pytest.approx(loop[0].probe_losses, rel=0.02)


def test_all_that_draws_random_numbers_meets_the_draws_of_the_loop():
    model, loss_of = prepared(dropout=0.5)
    draws = []

    def noisy():
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return loss_of() * (1 + sum(draws[-1])) * torch.rand(3).sum()

    for at_once in (1, 2):
        draws.clear()
        stats = refined(model, noisy, ESTIMATORS["fogzo"], at_once)
        if at_once == 1:
            loop, first = stats, draws[0]
        assert set(draws) == {first}
        # The backward's own, the check, and both ends of 5 probes or of 3 chunks.
        assert len(draws) == (12 if at_once == 1 else 8)
    assert_same_step(loop, stats)


def test_the_perturbed_weights_are_the_loops():
    for preset in PRESETS:
        model, loss_of = prepared(preset=preset)
        loss_of().backward()
        directions = Directions(fogzo.quantized_weights(model), seed=3)
        plan = [Probe(0, 0.9, 0.2), Probe(0, -0.9, 0.2), Probe(4, 0.0, 1.0), Probe(2, 1.0, 0.0)]
        with torch.no_grad():
            stacks = directions.stacks(plan)
            for row, probe in enumerate(plan):
                saved = [w.param.clone() for w in directions.weights]
                directions.add_offsets_(probe)
                for weight, stack, value in zip(directions.weights, stacks, saved, strict=True):
                    torch.testing.assert_close(stack[row], weight.param)
                    weight.param.copy_(value)


def test_a_whole_step_is_that_of_the_reference():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    model.double()
    fogzo.quantize_(model, fogzo.fixed(2, step=0.3), lambda *_: True)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    weights, q, n = fogzo.quantized_weights(model), 0.2, 5
    mse_loss(model(x), y).backward()
    g = [w.param.grad.clone() for w in weights]
    quantizer = model[0].quantizer

    def L(theta):
        first, second = (quantizer(t, torch.full((1, 1), 0.3, dtype=t.dtype)) for t in theta)
        return mse_loss((x @ first.T).tanh() @ second.T, y)

    literal = {"agreement": "measured", "noise_shape": "isotropic"}
    estimator = fogzo.FogzoEstimator(
        weights, num_samples=n, noise_share=q, probes_at_once=2, **literal
    )
    drawn = {}
    plan = estimator.plan

    def spy(share, directions):
        drawn["s"] = [directions.sign(i) for i in range(n)]
        drawn["u"] = [[u.clone() for u in directions.noise(i)] for i in range(n)]
        return plan(share, directions)

    estimator.plan = spy
    estimator.refine_grads_(lambda: mse_loss(model(x), y))
    with torch.no_grad():
        theta = [w.param.detach() for w in weights]
        eps = [w.step_size() * w.surrogate.radius for w in weights]
        expected = fogzo_gradient(L, theta, g, eps, q, **drawn)
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.param.grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_regulariser_that_reads_the_latent_weights_sees_the_perturbed_ones():
    model, loss_of = prepared(dropout=0.0)

    def decayed():
        return loss_of() + sum(p.square().sum() for p in model.parameters())

    assert_at_once_equals_the_loop(model, decayed)


def test_a_weight_without_gradient_is_left_alone():
    model, loss_of = prepared(dropout=0.0)
    weights = fogzo.quantized_weights(model)
    loss_of().backward()
    model.second.weight.grad = None
    fogzo.FogzoEstimator(weights, num_samples=3, probes_at_once=2).refine_grads_(loss_of)
    assert model.second.weight.grad is None


# Other people's quantization


class OwnLinear(nn.Linear):
    def forward(self, x):
        step = torch.tensor(0.25)
        rounded = ((self.weight / step).floor().clamp(-2, 1) + 0.5) * step
        weight = self.weight + (rounded - self.weight).detach()
        return nn.functional.linear(x, weight, self.bias)


def test_hand_written_triples_work_if_their_model_is_named():
    model = nn.Sequential(OwnLinear(4, 3), nn.Tanh(), OwnLinear(3, 2))
    x, y = torch.randn(6, 4), torch.randn(6, 2)
    triples = [(f"{i}.weight", model[i].weight, 0.25) for i in (0, 2)]
    results = []
    for at_once in (1, 2):
        model.zero_grad()
        mse_loss(model(x), y).backward()
        estimator = fogzo.FogzoEstimator(
            triples, num_samples=3, noise_share=0.2, model=model, probes_at_once=at_once
        )
        stats = estimator.refine_grads_(lambda: mse_loss(model(x), y))
        results.append((stats, [param.grad.clone() for _, param, _ in triples]))
    assert_same_step(*results)


@pytest.mark.parametrize("named", [None, nn.Linear(4, 3)])
def test_hand_written_triples_without_their_model_are_refused(named):
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="model=model, or probes_at_once=1"):
        fogzo.FogzoEstimator([("w", layer.weight, 0.5)], model=named, probes_at_once=2)


def test_a_compiled_model():
    model, _ = prepared(dropout=0.0)
    compiled = torch.compile(model, backend="eager")
    x, y = torch.randn(12, 8), torch.randint(3, (12,))
    assert_at_once_equals_the_loop(model, lambda: cross_entropy(compiled(x), y))


# Mistakes


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "all", None])
def test_what_is_no_number_of_probes(value):
    model, _ = prepared()
    with pytest.raises(ValueError, match='integer of 1 or more or "auto"'):
        fogzo.FogzoEstimator(fogzo.quantized_weights(model), probes_at_once=value)


def test_sharded_weights_are_refused(monkeypatch):
    # As if FSDP had cut them, which test_sharded.py does with two processes.
    monkeypatch.setattr("fogzo.probing.stacked.is_sharded", lambda param: True)
    model, _ = prepared()
    with pytest.raises(ValueError, match=r"is sharded.*use probes_at_once=1"):
        fogzo.FogzoEstimator(fogzo.quantized_weights(model), probes_at_once="auto")
    fogzo.FogzoEstimator(fogzo.quantized_weights(model), probes_at_once=1)


@pytest.mark.parametrize(
    "closure",
    [
        lambda model, loss_of: loss_of().item(),
        lambda model, loss_of: float(loss_of()),
        lambda model, loss_of: loss if (loss := loss_of()) > 0 else 2 * loss,
        lambda model, loss_of: model.seen.copy_(loss_of().expand(2)).mean(),
    ],
)
def test_what_vmap_cannot_follow_is_explained_and_everything_given_back(closure):
    model, loss_of = prepared()
    loss_of().backward()
    before = snapshot(model)
    estimator = fogzo.FogzoEstimator(
        fogzo.quantized_weights(model), num_samples=3, probes_at_once=2
    )
    with pytest.raises(ValueError, match="probes_at_once=1 evaluates"):
        estimator.refine_grads_(lambda: closure(model, loss_of))
    assert_unchanged(model, before)


def test_an_autograd_function_without_a_rule_is_explained():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    model, loss_of = prepared()
    loss_of().backward()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=3, probes_at_once=2)
    with pytest.raises(ValueError, match="probes_at_once=1 evaluates"):
        estimator.refine_grads_(lambda: Double.apply(loss_of()))


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda loss: loss.expand(4), r"got a tensor of shape \(4,\)"),
        (lambda loss: None, "got NoneType"),
        (lambda loss: loss.requires_grad_().backward(), "."),
        (lambda loss: torch.tensor(1.0), "does not depend on the quantized weights"),
        (lambda loss: 1.0, "does not depend on the quantized weights"),
    ],
)
def test_closures_that_the_loop_refuses_are_refused(closure, message):
    model, loss_of = prepared()
    loss_of().backward()
    before = snapshot(model)
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=3, probes_at_once=2)
    with pytest.raises((ValueError, RuntimeError), match=message):
        estimator.refine_grads_(lambda: closure(loss_of()))
    assert_unchanged(model, before)


def test_an_error_of_the_closure_itself_is_not_explained_away():
    model, loss_of = prepared()
    loss_of().backward()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=3, probes_at_once=2)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        estimator.refine_grads_(lambda: (torch.ones(2, 3) @ torch.ones(2, 3)).sum())
    assert "probes_at_once=1" in raised.value.__notes__[0]


def test_losses_that_are_not_finite_fall_back():
    model, loss_of = prepared()
    loss_of().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=3, probes_at_once=2)
    with pytest.warns(RuntimeWarning, match="not finite"):
        stats = estimator.refine_grads_(lambda: loss_of() * math.inf)
    assert stats.fallback
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


# Everything comes back


class Vandal:
    """A closure that disturbs all it can reach, and ends as it is told at a given call."""

    def __init__(self, model, loss_of, error=None, at=0):
        self.model, self.loss_of, self.error, self.at, self.calls = model, loss_of, error, at, 0

    def __call__(self):
        loss = self.loss_of()
        random.random()
        np.random.rand(3)
        torch.rand(5)
        self.model.seen.add_(1)
        self.model.seen = loss * torch.ones(2)
        self.model.norm.running_mean = self.model.norm.running_mean * 3 + 1
        self.model.zero_grad()
        self.model.eval()
        self.model.dropout.train()
        torch.set_grad_enabled(True)
        self.calls += 1
        if self.error and self.calls > self.at:
            raise self.error
        return loss


def snapshot(model):
    return {
        "own": [dict(m._parameters) | dict(m._buffers) for m in model.modules()],
        "values": {k: v.clone() for k, v in model.state_dict(keep_vars=True).items()},
        "grads": [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "streams": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
        "gradients on": torch.is_grad_enabled(),
    }


def assert_unchanged(model, before, rewritten=()):
    after = snapshot(model)
    for own, kept in zip(after["own"], before["own"], strict=True):
        assert own.keys() == kept.keys()
        assert all(own[name] is kept[name] for name in own)
    assert after["values"].keys() == before["values"].keys()
    for name, value in after["values"].items():
        assert torch.equal(value, before["values"][name]), name
    for (name, _), (grad, _), (kept, value) in zip(
        model.named_parameters(), after["grads"], before["grads"], strict=True
    ):
        assert grad is kept
        assert grad is None or name in rewritten or torch.equal(grad, value)
    assert after["modes"] == before["modes"]
    assert torch.equal(after["streams"][0], before["streams"][0])
    assert after["streams"][1:] == before["streams"][1:]
    assert after["gradients on"] == before["gradients on"]


@pytest.mark.parametrize("preset", ["fixed", "lsq", "quest", "ternary"])
@pytest.mark.parametrize(
    ("error", "at"), [(None, 0), *((e, k) for e in (OSError, KeyboardInterrupt) for k in range(5))]
)
def test_all_that_was_borrowed_comes_back(preset, error, at):
    model, loss_of = prepared(preset=preset)
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=3, noise_share=0.2, probes_at_once=2)
    with estimator.record_rng():
        loss = loss_of()
    loss.backward()
    before = snapshot(model)
    steps = [w.step_size().clone() for w in weights]
    closure = Vandal(model, loss_of, error, at)
    if error:
        with pytest.raises(error):
            estimator.refine_grads_(closure, expected_loss=loss)
        assert_unchanged(model, before)
    else:
        estimator.refine_grads_(closure, expected_loss=loss)
        assert closure.calls == 5
        assert_unchanged(model, before, rewritten={w.name for w in weights})
    for w, step in zip(weights, steps, strict=True):
        assert torch.equal(w.step_size(), step)


def test_a_run_of_several_steps_takes_the_loops_path():
    paths = []
    for at_once in (1, 3):
        torch.manual_seed(0)
        model, loss_of = prepared(preset="lsq")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        weights = fogzo.quantized_weights(model)
        estimator = fogzo.FogzoEstimator(weights, num_samples=4, probes_at_once=at_once)
        for _ in range(4):
            optimizer.zero_grad()
            with estimator.record_rng():
                loss = loss_of()
            loss.backward()
            estimator.refine_grads_(loss_of, expected_loss=loss)
            optimizer.step()
        paths.append(torch.cat([v.flatten().double() for v in model.state_dict().values()]))
    torch.testing.assert_close(*paths, rtol=1e-4, atol=1e-5)


# Memory


def test_auto_bounds_the_stacks_and_their_noise():
    layer = nn.Linear(1024, 1024)
    fogzo.quantize_(layer, fogzo.fixed(2, step=0.1), lambda *_: True)
    weights = fogzo.quantized_weights(layer)
    assert chunk_size("auto", weights) == 1  # 8 MiB a direction: the plain loop
    assert chunk_size(7, weights) == 7
    small = nn.Linear(64, 64)
    fogzo.quantize_(small, fogzo.fixed(2, step=0.1), lambda *_: True)
    assert chunk_size("auto", fogzo.quantized_weights(small)) == 4 * 2**20 // (64 * 64 * 8)
