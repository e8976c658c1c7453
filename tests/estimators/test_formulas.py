"""The estimators against the formulas they implement, through the public API."""

import math
import warnings

import pytest
import torch
from torch import nn

import fogzo
from fogzo.estimators.agreement import agreement_error, unevenness
from fogzo.estimators.reference import fogzo_gradient
from fogzo.layers.weights import as_quantized_weights
from fogzo.probing.directions import Directions
from fogzo.quantizers import SURROGATE_NAMES, resolve_surrogate, uniform
from toolbox import IN_16_BITS, PRESETS, WAYS, everything, fill, pairwise

# The gradients written by hand here often hardly agree with the loss, which deserves a warning.
pytestmark = pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Paper(fogzo.FogzoEstimator):
    """The paper's estimator to the letter."""

    def __init__(self, weights, **options):
        literal = {"agreement": "measured", "noise_shape": "isotropic"}
        super().__init__(weights, **literal | options)


class IsotropicPlacebo(fogzo.PlaceboEstimator):
    noise_shape = "isotropic"


def spying(cls):
    """The same estimator, which keeps the signs and the noise that it plans with."""

    class Spy(cls):
        def plan(self, noise_share, directions):
            samples, weights = range(self.num_samples), range(len(directions.weights))
            self.signs = [directions.sign(i) for i in samples]
            self.draws = [[directions.noise(i, k).clone() for k in weights] for i in samples]
            return super().plan(noise_share, directions)

    return Spy


class Toy:
    """Two tensors with three different step sizes, a hand-set gradient and any loss."""

    def __init__(self, loss, seed=0, surrogate=None, steps=None):
        self.params = [nn.Parameter(randn(2, 3, seed=seed)), nn.Parameter(randn(8, seed=seed + 1))]
        if steps is None:
            steps = [torch.tensor([[0.25], [0.7]]).double(), torch.tensor(0.4).double()]
        self.steps = steps
        self.surrogate = surrogate or resolve_surrogate("identity", uniform(2))
        self.loss = loss
        # A biased gradient, as a surrogate's is; unrelated to the loss in the linear toy so far.
        self.g = [randn(*p.shape, seed=seed + 7 + i) for i, p in enumerate(self.params)]
        if loss is not None:
            true = torch.autograd.grad(loss(self.params), self.params)
            self.g = [t + 0.2 * g for t, g in zip(true, self.g, strict=True)]

    @property
    def weights(self):
        return [
            fogzo.QuantizedWeight(f"w{i}", p, lambda s=s: s, surrogate=self.surrogate)
            for i, (p, s) in enumerate(zip(self.params, self.steps, strict=True))
        ]

    @property
    def eps(self):
        return [s * self.surrogate.radius for s in self.steps]

    def flat(self, tensors, factor):
        """In scaled coordinates, where one unit is one eps."""
        return torch.cat([(f * t).flatten() for f, t in zip(factor, tensors, strict=True)])

    @property
    def g_phi(self):
        return self.flat(self.g, self.eps)

    def closure(self):
        return self.loss(self.params)

    def refine(self, estimator, grads=None):
        """The refined gradient of one step, in scaled coordinates, and the statistics."""
        for p, g in zip(self.params, grads or self.g, strict=True):
            p.grad = g.clone()
        stats = estimator.refine_grads_(self.closure)
        return self.flat([p.grad for p in self.params], self.eps), stats


class LinearToy(Toy):
    """The linear loss ``<D, phi>``, for which mean and variance are known in closed form."""

    def __init__(self, seed=0, **options):
        super().__init__(None, seed, **options)
        # Half aligned with the gradient, so that every term of the formulas counts.
        other = [randn(*p.shape, seed=seed + 30 + i) for i, p in enumerate(self.params)]
        self.slopes = [0.5 * g + 0.5 * o for g, o in zip(self.g, other, strict=True)]
        self.loss = lambda ps: sum((p * s).sum() for p, s in zip(ps, self.slopes, strict=True))
        self.D = self.flat(self.slopes, self.eps)
        self.d = self.D.numel()
        self.N = self.g_phi.norm()
        self.ghat = self.g_phi / self.N
        self.c = self.ghat @ self.D

    def sample(self, estimator, count):
        return torch.stack([self.refine(estimator)[0] for _ in range(count)])


def assert_moments(samples, mean, variance):
    """Sample mean and total variance, within five standard errors of them."""
    count = len(samples)
    error = samples.std(0) / math.sqrt(count)
    assert ((samples.mean(0) - mean).abs() <= 5 * error + 1e-9 * mean.norm()).all()
    square = (samples - mean).square().sum(1)
    error = square.std() / math.sqrt(count)
    assert abs(square.mean() - variance) <= 5 * error + 1e-9 * mean.norm() ** 2


# T1: a smooth loss without quantizer


def smooth_loss(params):
    return sum((2 * p.sin() + p.square() * p / 7).sum() for p in params)


def gradient_of(params, loss):
    return torch.autograd.grad(loss(params), params)


def test_on_a_smooth_loss_the_guide_alone_gives_the_gradient_up_to_eps_squared():
    errors = []
    for size in (0.02, 0.01):
        toy = Toy(smooth_loss, steps=[torch.tensor(size).double(), torch.tensor(size).double()])
        g = gradient_of(toy.params, smooth_loss)
        estimator = Paper(toy.weights, noise_share=0.0)
        refined, stats = toy.refine(estimator, g)
        g_phi = toy.flat(g, toy.eps)
        # One factor for all tensors, whatever their step sizes.
        torch.testing.assert_close(refined, stats.agreement * g_phi, rtol=1e-12, atol=0)
        errors.append(abs(stats.agreement - 1))
    assert errors[0] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_a_hand_written_step_may_be_a_number():
    param = nn.Parameter(randn(5))
    param.grad = param.detach().cos()
    estimator = Paper([("w", param, 1e-3)], noise_share=0.0)
    estimator.refine_grads_(lambda: param.sin().sum())
    torch.testing.assert_close(param.grad, param.detach().cos(), rtol=1e-6, atol=0)


# T2: a linear loss, where mean and variance are exact


@pytest.mark.parametrize(("n", "share"), [(1, 0.02), (3, 0.3), (1, 0.8)])
def test_on_a_linear_loss_mean_and_variance_are_as_derived(n, share):
    toy = LinearToy()
    beta, kurtosis = 1 - share, toy.surrogate.perturbation.kurtosis
    D2 = toy.D @ toy.D
    mean = beta * toy.c * toy.ghat + share * toy.D
    variance = (
        beta * share * ((toy.d + 2) * toy.c**2 + D2) + share**2 * (toy.d + kurtosis - 2) * D2
    ) / n
    estimator = Paper(toy.weights, num_samples=n, noise_share=share)
    assert_moments(toy.sample(estimator, 400), mean, variance)


@pytest.mark.parametrize(("n", "surrogate"), [(1, "identity"), (3, "tanh"), (1, "erf")])
def test_spsa_is_unbiased_with_the_derived_variance(n, surrogate):
    surrogate = resolve_surrogate(surrogate, uniform(2))
    toy = LinearToy(seed=1, surrogate=surrogate)
    variance = (toy.d + surrogate.perturbation.kurtosis - 2) * (toy.D @ toy.D) / n
    estimator = fogzo.SpsaEstimator(toy.weights, num_samples=n)
    assert_moments(toy.sample(estimator, 400), toy.D, variance)


@pytest.mark.parametrize(("n", "share"), [(1, 0.05), (3, 0.5)])
def test_the_control_variate_has_the_derived_mean_and_variance(n, share):
    toy = LinearToy(seed=2)
    gap = toy.D - toy.g_phi
    variance = share**2 * (toy.d + toy.surrogate.perturbation.kurtosis - 2) * (gap @ gap) / n
    estimator = fogzo.ControlVariateEstimator(toy.weights, num_samples=n, weight=share)
    assert_moments(toy.sample(estimator, 400), toy.g_phi + share * gap, variance)


def test_the_control_variate_leaves_a_correct_gradient_alone():
    toy = LinearToy()
    estimator = fogzo.ControlVariateEstimator(toy.weights, num_samples=2)
    refined, _ = toy.refine(estimator, toy.slopes)
    torch.testing.assert_close(refined, toy.D, rtol=1e-9, atol=1e-12)


def test_the_control_variates_default_weight_has_the_least_squared_error():
    toy = LinearToy()
    for n in (1, 4):
        estimator = fogzo.ControlVariateEstimator(toy.weights, num_samples=n)
        kurtosis = toy.surrogate.perturbation.kurtosis
        assert estimator.noise_share(0) == pytest.approx(n / (n + toy.d + kurtosis - 2))
        _, stats = toy.refine(estimator)
        assert (stats.noise_share, stats.kappa) == (None, None)  # it has a weight instead


def test_the_placebo_has_fogzos_cross_noise_around_the_gradient():
    toy, share, n = LinearToy(seed=3), 0.3, 2
    estimator = IsotropicPlacebo(toy.weights, num_samples=n, noise_share=share)
    assert_moments(toy.sample(estimator, 400), toy.g_phi, toy.N**2 * share * toy.d / n)


def test_the_guide_alone_has_no_variance():
    toy = LinearToy()
    samples = toy.sample(Paper(toy.weights, noise_share=0.0, num_samples=2), 5)
    torch.testing.assert_close(samples, (toy.c * toy.ghat).expand(5, -1), rtol=1e-9, atol=1e-12)


# T3: reparametrising a tensor


def rescaled_gradients(preset, power, n=2):
    """Gradients of both layers after the first one's weights and steps became 2^power larger."""
    model = fill(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))
    fogzo.quantize_(model, PRESETS[preset](), everything)
    factor = 2.0**power
    with torch.no_grad():
        model[0].weight.mul_(factor)
        if model[0].weight_step is not None:
            model[0].weight_step.mul_(factor)
        if model[0].weight_step_knee is not None:
            model[0].weight_step_knee.mul_(factor)
    x = torch.randn(16, 8, generator=generator(9)) / factor
    y = torch.randn(16, 4, generator=generator(10))

    def loss_of():
        return (model(x) - y).square().mean()

    weights = fogzo.quantized_weights(model)
    estimator = Paper(weights, num_samples=n, noise_share=0.1)
    loss_of().backward()
    estimator.refine_grads_(loss_of)
    return [w.param.grad for w in weights]


@pytest.mark.parametrize("power", [-3, 5])
@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "quest"])  # quest adds 1e-8
def test_a_rescaled_weight_gets_the_inversely_scaled_gradient_bit_for_bit(preset, power):
    plain = rescaled_gradients(preset, 0)
    first, second = rescaled_gradients(preset, power)
    assert torch.equal(first * 2.0**power, plain[0])
    assert torch.equal(second, plain[1])


# T4: the fast path against the one-page reference


def quantized_model(quantizer, seed=0):
    """A small double-precision network, all layers quantized, and its loss."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    fogzo.quantize_(fill(model, seed=seed), quantizer, everything)
    x, y = randn(32, 8, seed=seed + 9), randn(32, 4, seed=seed + 10)
    return model, lambda: (model(x) - y).square().mean()


def reference_gradient(weights, loss_of, q, signs, draws):
    """`fogzo_gradient` in the basis where the weights are rounded, mapped back from it."""
    rotate = [w.rotate or (lambda t: t) for w in weights]
    latent = [w.param.detach().clone() for w in weights]
    eps = [w.step_size() * w.surrogate.radius for w in weights]

    def at(theta):
        for w, r, t in zip(weights, rotate, theta, strict=True):
            w.param.copy_(r(t))
        return loss_of()

    with torch.no_grad():
        contexts = [w.hold_step_size() for w in weights]
        for context in contexts:
            context.__enter__()
        try:
            theta = [r(t) for r, t in zip(rotate, latent, strict=True)]
            g = [r(w.param.grad) for r, w in zip(rotate, weights, strict=True)]
            refined = fogzo_gradient(at, theta, g, eps, q, signs, draws)
            return [r(G) for r, G in zip(rotate, refined, strict=True)]
        finally:
            for context in contexts:
                context.__exit__(None, None, None)
            for w, t in zip(weights, latent, strict=True):
                w.param.copy_(t)


def assert_equals_reference(model, loss_of, n, q, **options):
    weights = fogzo.quantized_weights(model)
    estimator = spying(Paper)(weights, num_samples=n, noise_share=q, seed=3, **options)
    loss_of().backward()
    before = [w.param.detach().clone() for w in weights]
    given = [w.param.grad.clone() for w in weights]
    estimator.refine_grads_(loss_of)
    assert all(torch.equal(w.param, b) for w, b in zip(weights, before, strict=True))
    fast = torch.cat([w.param.grad.flatten().clone() for w in weights])
    for w, g in zip(weights, given, strict=True):
        w.param.grad = g
    slow = reference_gradient(weights, loss_of, q, estimator.signs, estimator.draws)
    slow = torch.cat([G.flatten() for G in slow])
    assert slow.norm() > 0
    assert (fast - slow).norm() < 1e-10 * slow.norm()


@pairwise(preset=PRESETS, n=[1, 3], evaluate=WAYS)
def test_the_fast_path_equals_the_reference_and_leaves_the_weights_alone(preset, n, evaluate):
    assert_equals_reference(*quantized_model(PRESETS[preset]()), n, 0.05, evaluate=evaluate)


@pytest.mark.parametrize("q", [0.0, 1e-9, 0.9])
def test_the_fast_path_equals_the_reference_for_every_share_of_noise(q):
    assert_equals_reference(*quantized_model(fogzo.quest(4, block=2), seed=20), 2, q)


@pytest.mark.parametrize("surrogate", SURROGATE_NAMES)
def test_the_fast_path_equals_the_reference_for_every_surrogate(surrogate):
    assert_equals_reference(*quantized_model(fogzo.lsq(2, surrogate=surrogate)), 2, 0.1)


@pytest.mark.parametrize("preset", ["lsq per group", "quest"])
def test_the_result_is_the_slope_times_what_the_weights_moved_by(preset):
    # Seen from outside: nothing but the perturbed weights, the two losses and the new gradient.
    model, loss_of = quantized_model(PRESETS[preset]())
    weights = fogzo.quantized_weights(model)
    estimator = Paper(weights, noise_share=0.1)
    seen = []

    def closure():
        seen.append([w.param.clone() for w in weights])
        return loss_of()

    loss_of().backward()
    stats = estimator.refine_grads_(closure)
    plus, minus = stats.probe_losses
    for w, up, down in zip(weights, *seen, strict=True):
        rotate = w.rotate or (lambda t: t)
        eps = w.step_size() * w.surrogate.radius
        torch.testing.assert_close((up + down) / 2, w.param.detach())
        v = rotate(up - down) / 2 / eps
        expected = rotate((plus - minus) / 2 * v / eps)
        torch.testing.assert_close(w.param.grad, expected, rtol=1e-9, atol=1e-12)


# T5: a share of noise that float32 cannot tell from none


@pytest.mark.parametrize("share", [1e-9, 1e-7])
def test_a_tiny_share_of_noise_has_the_right_size_in_float32(share):
    # Zero weights show their perturbation exactly; only the first one has a gradient.
    count, step = 20_001, 0.25
    param = nn.Parameter(torch.zeros(count))
    eps = step / math.sqrt(12)
    seen = []

    def closure():
        seen.append(param.detach().clone())
        return 3 * param[0]

    estimator = Paper([("w", param, step)], noise_share=share)
    param.grad = torch.zeros(count)
    param.grad[0] = 2.0
    stats = estimator.refine_grads_(closure)
    assert stats.noise_share == share
    assert stats.kappa == pytest.approx(share * count / (1 - share), rel=1e-12)
    assert abs(seen[0][0] / eps) == pytest.approx(1, rel=1e-3)
    noise = seen[0][1:] / eps
    assert noise.std().item() == pytest.approx(math.sqrt(share), rel=0.02)
    assert abs(noise.mean().item()) < 5 * math.sqrt(share / count)
    slope = (stats.probe_losses[0] - stats.probe_losses[1]) / 2
    written = param.grad[1:].std().item()
    assert written == pytest.approx(abs(slope) * math.sqrt(share) / eps, rel=0.02)


# T8: what rounding adds to the measured slope


def test_the_measured_slope_of_a_rounded_linear_loss_scatters_by_its_flips():
    count, trials, step = 200, 1500, 0.5
    g = randn(count)
    ghat = g / g.norm()
    param = nn.Parameter(torch.zeros(count).double())
    estimator = Paper([("w", param, step)], noise_share=0.0)
    stream = generator(5)
    agreements = []
    spread = math.sqrt(math.sqrt(3) * ghat.abs().pow(3).sum())
    for _ in range(trials):
        with torch.no_grad():
            param.uniform_(-4, 4, generator=stream)
        param.grad = g.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # now and then no weight flips
            stats = estimator.refine_grads_(lambda: (g * step * (param / step).round()).sum())
        agreements.append(stats.agreement or 0.0)
        if stats.agreement_error is not None:
            assert stats.agreement_error == pytest.approx(spread, rel=1e-6)
    agreements = torch.tensor(agreements).double()
    assert abs(agreements.mean() - 1) < 5 * spread / math.sqrt(trials)
    assert agreements.std().item() == pytest.approx(spread, rel=5 / math.sqrt(2 * trials))


@pytest.mark.parametrize(
    ("n", "share", "one_sided"), [(4, 0.0, False), (4, 0.0, True), (8, 0.02, False)]
)
def test_probes_that_cross_the_same_thresholds_average_nothing_out(n, share, one_sided):
    count, trials = 1000, 60
    g = randn(count)
    param = nn.Parameter(torch.zeros(count).double())
    weights = [("w", param, 1.0)]
    estimator = Paper(weights, num_samples=n, noise_share=share, one_sided=one_sided)
    stream = generator(5)
    agreements, errors = [], []

    def loss():
        return (g * param.round()).sum()

    for _ in range(trials):
        with torch.no_grad():
            param.uniform_(-4, 4, generator=stream)
        param.grad = g.clone()
        stats = estimator.refine_grads_(loss, expected_loss=loss() if one_sided else None)
        agreements.append(stats.agreement)
        errors.append(stats.agreement_error)
    scatter = torch.tensor(agreements).std().item()
    assert 0.8 * scatter < sum(errors) / trials < 1.35 * scatter


HALF = slice(None, None, 2)
SHAPES = {
    "experts": ((2, 64, 96), HALF),
    "tokens": ((8192, 8), HALF),
    "channels": ((4, 3, 2, 4096), HALF),
    "inputs": ((64, 192), (..., slice(None, None, 3))),
    # Of a convolution that pads pictures of one pixel, all but the centre.
    "kernel": ((64, 64, 3, 3), (..., torch.arange(9).reshape(3, 3) != 4)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_sample_of_a_large_weight_meets_what_has_a_gradient(name, per_channel, monkeypatch):
    shape, without = SHAPES[name]
    param = nn.Parameter(randn(*shape).float().round())  # on levels
    param.grad = randn(*shape, seed=1).float()
    param.grad[without] = 0.0
    step = torch.ones(shape[0], *[1] * (len(shape) - 1)) if per_channel else torch.ones(())
    weight = fogzo.QuantizedWeight("w", param, lambda: step, grid=uniform(3))
    directions = Directions(as_quantized_weights([weight]), 0)

    def measured():
        return agreement_error(directions, 0.0, 0.0, 1, one_sided=False), unevenness(directions)

    found = measured()
    monkeypatch.setattr("fogzo.estimators.agreement._SAMPLE", param.numel())
    assert found == pytest.approx(measured(), rel=0.1)
    assert found[1] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_standard_error_does_not_depend_on_the_losss_units(dtype):
    def error(scale):
        param = nn.Parameter(torch.linspace(-1, 1, 64).to(dtype))
        param.grad = (scale * randn(64)).to(dtype)
        directions = Directions(as_quantized_weights([("w", param, 0.1)]), 0)
        return agreement_error(directions, 0.0, 0.0, 1, one_sided=False)

    assert error(2.0**-12) == pytest.approx(error(1.0), rel=0.01)
    if dtype == torch.float32:
        assert error(2.0**-50) == pytest.approx(error(1.0), rel=1e-6)


# Cheaper probes


@pytest.mark.parametrize("n", [1, 3])
def test_one_sided_differences_equal_the_formula_in_the_weights_own_units(n):
    model, loss_of = quantized_model(fogzo.lsq(2))
    weights = fogzo.quantized_weights(model)
    estimator = spying(Paper)(weights, num_samples=n, noise_share=0.05, one_sided=True)
    base = loss_of()
    base.backward()
    given = [w.param.grad.clone() for w in weights]
    stats = estimator.refine_grads_(loss_of, expected_loss=base)
    fast = torch.cat([w.param.grad.flatten() for w in weights])
    assert len(stats.probe_losses) == n
    assert stats.base_loss == base.item()

    for w, g in zip(weights, given, strict=True):
        w.param.grad = g
    plus = []

    def mirrored():
        """The reference asks for L+ and L- in turn: answer the second with 2 L - L+."""
        if plus:
            return 2 * base - plus.pop()
        plus.append(loss_of())
        return plus[0]

    slow = reference_gradient(weights, mirrored, 0.05, estimator.signs, estimator.draws)
    slow = torch.cat([G.flatten() for G in slow])
    assert (fast - slow).norm() < 1e-10 * slow.norm()


def test_on_a_linear_loss_one_side_says_as_much_as_two():
    toy = LinearToy()
    two, one = (Paper(toy.weights, noise_share=0.3, one_sided=side) for side in (False, True))
    for _ in range(3):
        a, _ = toy.refine(two)
        for p, g in zip(toy.params, toy.g, strict=True):
            p.grad = g.clone()
        one.refine_grads_(toy.closure, expected_loss=toy.closure())
        b = toy.flat([p.grad for p in toy.params], toy.eps)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_curvature_adds_to_the_variance_of_one_side_what_was_derived():
    # A loss of pure curvature: two-sided differences are exactly zero.
    hessian = torch.arange(1.0, 15.0, dtype=torch.float64)
    toy = LinearToy()
    toy.loss = lambda ps: ((phi_of(ps) - start).square() * hessian).sum() / 2

    def phi_of(ps):
        return torch.cat([(p / e).flatten() for p, e in zip(ps, toy.eps, strict=True)])

    start = phi_of(toy.params).detach()
    q, samples, squares = 0.5, [], []
    estimator = spying(Paper)(toy.weights, noise_share=q, one_sided=True)
    for _ in range(600):
        for p, g in zip(toy.params, toy.g, strict=True):
            p.grad = g.clone()
        estimator.refine_grads_(toy.closure, expected_loss=toy.closure())
        samples.append(toy.flat([p.grad for p in toy.params], toy.eps))
        (u,), (s,) = estimator.draws, estimator.signs
        v = (1 - q) ** 0.5 * s * toy.ghat + q**0.5 * torch.cat([t.flatten() for t in u])
        squares.append((v * hessian) @ v)
        torch.testing.assert_close(samples[-1], squares[-1] / 2 * v, rtol=1e-8, atol=1e-10)
    samples = torch.stack(samples)
    error = samples.std(0) / math.sqrt(len(samples))
    assert (samples.mean(0).abs() <= 5 * error).all()  # symmetric noise: no bias


def test_one_sided_differences_need_the_loss_of_every_step():
    model, loss_of = quantized_model(fogzo.lsq(2))
    estimator = Paper(fogzo.quantized_weights(model), one_sided=True)
    loss = loss_of()
    loss.backward()
    estimator.refine_grads_(loss_of, expected_loss=loss)
    model.zero_grad()
    loss_of().backward()
    with pytest.raises(ValueError, match=r"refine_grads_\(closure, expected_loss=loss\)"):
        estimator.refine_grads_(loss_of)


def test_a_base_loss_that_is_not_finite_keeps_the_gradient():
    model, loss_of = quantized_model(fogzo.lsq(2))
    weights = fogzo.quantized_weights(model)
    estimator = Paper(weights, one_sided=True)
    loss_of().backward()
    given = [w.param.grad.clone() for w in weights]
    with pytest.raises(ValueError, match="expected_loss is inf"):
        estimator.refine_grads_(loss_of, expected_loss=math.inf)
    with pytest.warns(RuntimeWarning, match="not finite"):
        stats = estimator.refine_grads_(lambda: loss_of() + math.inf, expected_loss=math.inf)
    assert stats.fallback == "a probe loss is not finite"
    assert all(torch.equal(w.param.grad, g) for w, g in zip(weights, given, strict=True))


# The placebo


def test_the_placebo_draws_fogzos_own_noise_and_calls_no_closure():
    toy, share, n = Toy(smooth_loss), 0.2, 3
    fogzo_spy = spying(Paper)(toy.weights, num_samples=n, noise_share=share, seed=11)
    toy.refine(fogzo_spy)
    placebo = IsotropicPlacebo(toy.weights, num_samples=n, noise_share=share, seed=11)
    for p, g in zip(toy.params, toy.g, strict=True):
        p.grad = g.clone()
    stats = placebo.refine_grads_(lambda: pytest.fail("the placebo measured a loss"))
    assert stats.probe_losses == ()
    N = toy.g_phi.norm()
    for i, (p, g, e) in enumerate(zip(toy.params, toy.g, toy.eps, strict=True)):
        mean = sum(s * u[i] for s, u in zip(fogzo_spy.signs, fogzo_spy.draws, strict=True)) / n
        expected = g + N * math.sqrt(share) * mean / e
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)


def test_the_placebo_needs_no_closure_at_all():
    toy = Toy(smooth_loss)
    for p, g in zip(toy.params, toy.g, strict=True):
        p.grad = g.clone()
    assert IsotropicPlacebo(toy.weights).refine_grads_().fallback is None


# Draws


def draws_of(seed=0, steps_before=0, n=2):
    toy = Toy(smooth_loss)
    estimator = spying(Paper)(toy.weights, num_samples=n, noise_share=0.1, seed=seed)
    for _ in range(steps_before):
        toy.refine(estimator)
    refined, _ = toy.refine(estimator)
    noise = [torch.cat([u.flatten() for u in draw]) for draw in estimator.draws]
    return noise, estimator.signs, refined


def test_the_same_seed_and_step_give_the_same_directions():
    first, second = draws_of(5, 1), draws_of(5, 1)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])


def test_other_seeds_steps_and_samples_give_other_directions():
    draws = [*draws_of(0)[0], *draws_of(0, 1)[0], *draws_of(1)[0], *draws_of(2**40)[0]]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert not torch.isclose(a, b).any()


def test_the_signs_are_fair_and_independent_of_the_noise():
    count = 2000
    param = nn.Parameter(torch.zeros(1).double())
    estimator = spying(IsotropicPlacebo)([("w", param, 1.0)], num_samples=count, noise_share=0.1)
    param.grad = torch.ones(1).double()
    estimator.refine_grads_()
    signs = torch.tensor(estimator.signs).double()
    noise = torch.tensor([float(u[0]) for u in estimator.draws]).double()
    assert set(estimator.signs) == {-1.0, 1.0}
    bound = 5 / math.sqrt(count)
    assert abs(signs.mean()) < bound
    assert abs((signs[1:] * signs[:-1]).mean()) < bound
    assert abs((signs * noise).mean()) < bound
    assert abs(noise.mean()) < bound
    assert abs((noise[1:] * noise[:-1]).mean()) < bound


def test_the_signs_are_fair_from_step_to_step():
    toy = Toy(smooth_loss)
    estimator = spying(IsotropicPlacebo)(toy.weights, noise_share=0.1)
    total = 0.0
    for _ in range(400):
        toy.refine(estimator)
        total += estimator.signs[0]
    assert abs(total) < 5 * math.sqrt(400)


@pytest.mark.parametrize("surrogate", SURROGATE_NAMES)
def test_the_noise_is_the_surrogates_own_law_in_unit_variance(surrogate):
    surrogate = resolve_surrogate(surrogate, uniform(2))
    param = nn.Parameter(torch.zeros(40_000))
    record = fogzo.QuantizedWeight("w", param, lambda: torch.tensor(1.0), surrogate=surrogate)
    estimator = spying(IsotropicPlacebo)([record], noise_share=0.1)
    param.grad = torch.ones(40_000)
    estimator.refine_grads_()
    u = estimator.draws[0][0].double()
    kurtosis = surrogate.perturbation.kurtosis
    assert abs(u.mean()) < 5 / 200
    assert abs(u.square().mean() - 1) < 5 * math.sqrt(kurtosis - 1) / 200
    assert u.pow(4).mean().item() == pytest.approx(kurtosis, rel=0.15)


def test_a_resumed_run_draws_the_same_directions():
    toy = Toy(smooth_loss)
    first = Paper(toy.weights, noise_share=0.1, seed=7)
    for _ in range(3):
        toy.refine(first)
    saved = first.state_dict()
    following = [toy.refine(first)[0] for _ in range(2)]
    assert not torch.equal(*following)
    second = Paper(toy.weights, noise_share=0.1, seed=8)
    second.load_state_dict(saved)
    assert second.state_dict() == saved
    for expected in following:
        assert torch.equal(toy.refine(second)[0], expected)


# Options


def observed(toy, **options):
    """The perturbation of the first probe in scaled coordinates, one tensor a weight."""
    estimator = Paper(toy.weights, **options)
    seen = []
    loss = toy.loss

    def watching(params):
        seen.append([p.detach().clone() for p in params])
        return loss(params)

    toy.loss = watching
    try:
        refined, stats = toy.refine(estimator)
    finally:
        toy.loss = loss
    moved = [(up - p.detach()) / e for up, p, e in zip(seen[0], toy.params, toy.eps, strict=True)]
    return moved, refined, stats


def test_noise_can_follow_each_tensors_gradient():
    toy, share = Toy(smooth_loss), 0.9
    toy.g[0] = toy.g[0] * 30
    isotropic, _, _ = observed(toy, noise_share=share)
    shaped, refined, stats = observed(toy, noise_share=share, noise_shape="tensor_rms")
    g_phi = [g * e for g, e in zip(toy.g, toy.eps, strict=True)]
    whole = toy.g_phi
    sign = spying(Paper)(toy.weights, noise_share=share)
    toy.refine(sign)
    for i in range(2):
        guide = math.sqrt(1 - share) * sign.signs[0] * g_phi[i] / whole.norm()
        ratio = toy.g[i].square().mean().sqrt() / whole.square().mean().sqrt()
        # The same draws, scaled so that u / eps gets the root mean square of the gradient.
        shape = toy.eps[i] * ratio
        torch.testing.assert_close(shaped[i] - guide, shape * (isotropic[i] - guide))
    slope = (stats.probe_losses[0] - stats.probe_losses[1]) / 2
    expected = slope * torch.cat([v.flatten() for v in shaped])
    torch.testing.assert_close(refined, expected, rtol=1e-8, atol=1e-12)


def test_spsa_needs_no_backward():
    toy = Toy(smooth_loss)
    bystander = nn.Parameter(torch.zeros(3))
    estimator = spying(fogzo.SpsaEstimator)(toy.weights, num_samples=2)
    assert all(p.grad is None for p in toy.params)
    stats = estimator.refine_grads_(toy.closure)
    assert bystander.grad is None
    assert (stats.noise_share, stats.kappa, stats.fallback) == (None, None, None)
    assert len(stats.probe_losses) == 4
    slopes = [
        (p - m) / 2 for p, m in zip(stats.probe_losses[::2], stats.probe_losses[1::2], strict=True)
    ]
    for i, (p, e) in enumerate(zip(toy.params, toy.eps, strict=True)):
        expected = sum(s * u[i] for s, u in zip(slopes, estimator.draws, strict=True)) / 2 / e
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)


def test_spsa_does_not_depend_on_gradients_that_are_there():
    toy = Toy(smooth_loss)
    fogzo.SpsaEstimator(toy.weights).refine_grads_(toy.closure)
    fresh = [p.grad.clone() for p in toy.params]
    for broken in (3.0, math.inf, math.nan):
        for p in toy.params:
            p.grad = torch.full_like(p, broken)
        stats = fogzo.SpsaEstimator(toy.weights).refine_grads_(toy.closure)
        assert stats.fallback is None
        assert all(torch.equal(p.grad, f) for p, f in zip(toy.params, fresh, strict=True))


def test_a_closure_may_return_the_same_tensor_every_time():
    # A preallocated accumulator, or the static output of a captured graph.
    toy = Toy(smooth_loss)
    expected, stats = toy.refine(Paper(toy.weights, noise_share=0.1))
    accumulator = torch.zeros(()).double()
    toy.loss = lambda params: accumulator.copy_(smooth_loss(params))
    refined, reused = toy.refine(Paper(toy.weights, noise_share=0.1))
    assert reused.probe_losses == stats.probe_losses
    assert torch.equal(refined, expected)


@IN_16_BITS
def test_half_precision_weights_are_perturbed_with_float32_noise():
    # sqrt(q) eps u is far below bfloat16's resolution next to the weight, but not next to zero.
    param = nn.Parameter(torch.zeros(4000, dtype=torch.bfloat16))
    param.grad = torch.zeros_like(param)
    param.grad[0] = 1.0
    seen = []

    def closure():
        seen.append(param.detach().float())
        return param[0].float()

    estimator = Paper([("w", param, 0.5)], noise_share=1e-6)
    with pytest.warns(RuntimeWarning, match=r"bfloat16, too coarse .*logits\.float\(\)"):
        estimator.refine_grads_(closure)
    noise = seen[0][1:] / (0.5 / math.sqrt(12))
    assert noise.std().item() == pytest.approx(1e-3, rel=0.1)
    assert param.grad.dtype == torch.bfloat16
    assert (param == 0).all()


def test_a_group_whose_step_is_zero_neither_moves_nor_breaks_the_others():
    toy = Toy(
        smooth_loss, steps=[torch.tensor([[0.0], [0.3]]).double(), torch.tensor(0.3).double()]
    )
    estimator = Paper(toy.weights, noise_share=0.2)
    seen = []
    loss = toy.loss
    toy.loss = lambda params: (seen.append(params[0].detach().clone()), loss(params))[1]
    toy.refine(estimator)
    assert all(torch.equal(w[0], toy.params[0][0]) for w in seen)
    assert all(p.grad.isfinite().all() for p in toy.params)


def test_a_fixed_step_in_a_preset_sets_the_radius():
    model, loss_of = quantized_model(fogzo.fixed(2, step_size=0.125))
    weights = fogzo.quantized_weights(model)
    estimator = Paper(weights, noise_share=0.5)
    seen = []

    def closure():
        seen.append(weights[0].param.clone())
        return loss_of()

    loss_of().backward()
    estimator.refine_grads_(closure)
    largest = (seen[0] - weights[0].param).abs().max() / (0.125 / math.sqrt(12))
    assert 0.5 < largest < math.sqrt(0.5) * (1 + math.sqrt(3))


def test_no_step_of_an_ordinary_run_warns():
    model, loss_of = quantized_model(fogzo.lsq(2))
    estimator = Paper(fogzo.quantized_weights(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.zero_grad()
            loss = loss_of()
            loss.backward()
            estimator.refine_grads_(loss_of, expected_loss=loss)
