"""Draws of one category of several: their laws, and what the backward rules promise in the mean."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fogzo
from fogzo.quantizers import (
    SIGN,
    TERNARY,
    Grid,
    Quantizer,
    conditional_gumbels,
    draw_levels,
    fixed_scale,
    level_logits,
    one_hot_sample,
    uniform,
)
from fogzo.quantizers.smoothing import Logistic, Normal, Rademacher, Triangular, Uniform
from toolbox import WAYS, draw, everything, streams_put_back

RULES = ("gumbel_rao", "reinmax", "st")
EVERY_RULE = pytest.mark.parametrize("backward", RULES)
THETA = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64)
SLOPE = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    with streams_put_back(0):
        yield


def experiment():
    folder = str(Path(__file__).parents[2] / "experiments")
    sys.path.insert(0, folder)
    try:
        import latents
    finally:
        sys.path.remove(folder)
    return latents


def by_draw(theta, loss, backward):
    """The estimate of each possible draw, of rules that only depend on the draw."""
    logits = theta.repeat(1000, 1).requires_grad_()
    one_hot = one_hot_sample(logits, backward)
    loss(one_hot).sum().backward()
    drawn = one_hot.detach().argmax(-1)
    found = [logits.grad[drawn == category] for category in range(len(theta))]
    assert all((grads == grads[0]).all() for grads in found)
    return torch.stack([grads[0] for grads in found])


def exact(theta, loss):
    theta = theta.clone().requires_grad_()
    expected = theta.softmax(-1) @ loss(torch.eye(len(theta), dtype=theta.dtype))
    return torch.autograd.grad(expected, theta)[0]


# Laws


@EVERY_RULE
def test_categories_come_as_often_as_they_should(backward):
    logits = torch.tensor([1.0, 2.0, 3.0]).expand(2, 50_000, 3)
    one_hot = one_hot_sample(logits, backward)
    assert one_hot.shape == logits.shape and set(one_hot.unique().tolist()) == {0.0, 1.0}
    assert (one_hot.sum(-1) == 1).all()
    torch.testing.assert_close(one_hot.mean((0, 1)), logits[0, 0].softmax(0), atol=6e-3, rtol=0)


def test_perturbed_logits_are_those_of_rejection():
    logits, drawn = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0])
    y = logits - torch.empty(1_000_000, 3).exponential_().log()
    rejected = y[y.argmax(1) == 1]
    direct = conditional_gumbels(logits.expand(len(rejected), 3), drawn.expand(len(rejected), 3))
    assert (direct.argmax(1) == 1).all()
    for found in (rejected, direct):
        torch.testing.assert_close(
            found.mean(0), torch.tensor([1.338, 3.980, 2.765]), atol=0.012, rtol=0
        )
    torch.testing.assert_close(direct.std(0), rejected.std(0), atol=0.012, rtol=0)
    torch.testing.assert_close(direct.T.corrcoef(), rejected.T.corrcoef(), atol=0.012, rtol=0)


@pytest.mark.parametrize("grid", [SIGN, TERNARY, uniform(3)], ids=lambda grid: grid.name)
@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_levels_come_as_often_as_from_stochastic_rounding(grid, name):
    quantizer = Quantizer(grid, fixed_scale(1.0), name, stochastic=True)
    x = torch.linspace(-5, 5, 21).expand(20_000, -1)
    levels = draw_levels(x, grid, quantizer.surrogate.law)
    rounded = quantizer(x, torch.ones(1, 1), training=True)
    for level in {grid.level(code) for code in range(grid.low_code, grid.high_code + 1)}:
        shares = [(found == level).double().mean(0) for found in (levels, rounded)]
        assert (shares[0] - shares[1]).abs().max() < 5 * 0.5 * (2 / 20_000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_uniform_number_of_zero_draws_no_masked_category(dtype, monkeypatch):
    def with_zeros(self, uniform_=torch.Tensor.uniform_):
        uniform_(self)[..., -1] = 0  # as one of 2^24 numbers of float32 is
        return self

    monkeypatch.setattr(torch.Tensor, "uniform_", with_zeros)
    logits = torch.tensor([0.0, 0.0, -30.0 if dtype != torch.float64 else -50.0], dtype=dtype)
    assert not one_hot_sample(logits.expand(100, 3))[:, 2].any()
    likely = logits.flip(0).expand(100, 3)
    assert one_hot_sample(likely)[:, 2].any()
    assert conditional_gumbels(likely, torch.eye(3, dtype=dtype)[2].expand(100, 3)).max() < 50


@pytest.mark.parametrize("law", [Logistic(2.0), Normal(0.5)], ids=str)
def test_unlikely_levels_are_as_unlikely_on_either_side(law):
    x, grid = torch.linspace(0.1, 5.0, 50), uniform(2)
    logits, mirrored = level_logits(x, grid, law), level_logits(-x, grid, law).flip(-1)
    torch.testing.assert_close(logits, mirrored, rtol=1e-4, atol=1e-5)
    assert level_logits(torch.tensor(5.0), grid, Logistic(2.0))[0].item() == pytest.approx(-24.0)


# Means and variances of gradients


def test_reinmax_is_exact_for_quadratic_functions_and_not_for_cubic_ones():
    a, b = draw(3, 3, dtype=torch.float64), draw(3, seed=1, dtype=torch.float64)
    quadratic = lambda z: ((z @ a) * z).sum(-1) + z @ b  # noqa: E731
    cubic = lambda z: (z @ SLOPE + 1.5) ** 3  # noqa: E731
    for loss, is_exact in ((quadratic, True), (cubic, False)):
        bias = THETA.softmax(-1) @ by_draw(THETA, loss, "reinmax") - exact(THETA, loss)
        if is_exact:
            assert bias.norm() < 2e-15
        else:
            assert bias.norm() > 0.1 * exact(THETA, loss).norm()


def test_straight_through_is_the_slope_of_the_softmax():
    logits = draw(5, 4).requires_grad_()
    (one_hot_sample(logits, "st", temperature=0.5) * torch.arange(4.0)).sum().backward()
    same = logits.detach().clone().requires_grad_()
    ((same / 0.5).softmax(-1) * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(logits.grad, same.grad)


def test_samples_cut_the_variance_by_the_formula_and_leave_the_mean_alone():
    toy, draws = experiment(), 40_000
    within, between = toy.toy_variances(draws, 0.1)
    assert within > 4 * between  # so that the formula has something to say
    grads = {samples: toy.toy_gradients(draws, 0.1, samples) for samples in (1, 10)}
    for samples, found in grads.items():
        assert found.var(0).sum() == pytest.approx(within / samples + between, rel=0.05)
    error = (sum(g.var(0) for g in grads.values()) / draws).sqrt()
    assert ((grads[1].mean(0) - grads[10].mean(0)).abs() < 4 * error).all()


def test_one_sample_is_the_straight_through_gumbel_softmax_in_mean_and_variance():
    toy, draws = experiment(), 100_000
    logits = torch.tensor(toy.LOGITS, dtype=torch.float64).repeat(draws, 1).requires_grad_()
    y = logits - torch.empty_like(logits).exponential_().log()
    soft = (y / 0.5).softmax(-1)
    hard = nn.functional.one_hot(y.argmax(-1), 3).double()
    toy.toy_loss(hard + soft - soft.detach()).sum().backward()
    ours = toy.toy_gradients(draws, 0.5, 1)
    error = ((ours.var(0) + logits.grad.var(0)) / draws).sqrt()
    assert ((ours.mean(0) - logits.grad.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(ours.var(0), logits.grad.var(0), rtol=0.05, atol=0)


@pytest.mark.parametrize("law", [Logistic(1.0), Normal(1.0)], ids=str)
def test_the_mean_slope_of_reinmax_on_levels_is_that_of_the_smoothed_staircase(law):
    grid = uniform(2)
    for value in (-0.7, 0.2):
        x = torch.full((4000,), value, dtype=torch.float64, requires_grad=True)
        levels = draw_levels(x, grid, law, "reinmax")
        levels.sum().backward()
        shares = level_logits(x[0].detach(), grid, law).exp()
        slopes = [x.grad[levels == grid.level(code)][0] for code in range(-2, 2)]
        expected = sum(law.pdf(x[0].detach() - threshold) for threshold in grid.thresholds)
        torch.testing.assert_close(shares @ torch.stack(slopes), expected)


# Numbers that are not nice


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_draw_has_the_dtype_of_its_logits_and_so_has_the_gradient(backward, dtype):
    logits = draw(6, 4).to(dtype).requires_grad_()
    one_hot = one_hot_sample(logits, backward)
    (one_hot * torch.arange(4, dtype=dtype)).sum().backward()
    assert one_hot.dtype == logits.grad.dtype == dtype
    assert logits.grad.isfinite().all() and logits.grad.any()


@EVERY_RULE
def test_logits_far_from_each_other_keep_finite_gradients(backward):
    logits = torch.tensor([[0.0, -1e4], [1e4, -1e4], [-3e38, 3e38]], requires_grad=True)
    one_hot = one_hot_sample(logits, backward, temperature=0.1)
    assert one_hot.argmax(-1).tolist() == [0, 0, 1]
    (one_hot * torch.tensor([1.0, 2.0])).sum().backward()
    assert logits.grad.isfinite().all()


def test_autocast_rounds_neither_levels_nor_their_gradient():
    grid, x = Grid("thirds", -1, 1, spacing=2 / 3), torch.randn(64)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        weight = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            levels = draw_levels(weight, grid, Logistic(tau=2.0))
        levels.backward(x)
        found.append((levels.detach(), weight.grad))
    assert set(found[0][0].tolist()) == set(grid.level(torch.arange(-1, 2.0)).tolist())
    assert all(map(torch.equal, *found))


def test_weights_far_beyond_the_range_stay_there():
    x = torch.tensor([-1e6, -40.0, 40.0, 1e6], requires_grad=True)
    levels = draw_levels(x, uniform(2), Logistic(2.0), "gumbel_rao")
    levels.sum().backward()
    assert levels.tolist() == [-1.5, -1.5, 1.5, 1.5]
    assert x.grad.abs().max() < 1e-6


def test_a_draw_from_logits_that_cannot_be_read_is_nan_where_they_are_not_finite():
    logits = torch.tensor([[[0.0, torch.nan], [0.0, 1.0]]])
    one_hot = torch.vmap(one_hot_sample, randomness="same")(logits)
    assert one_hot[0].isnan().all(-1).tolist() == [True, False]


# Where it is used


@EVERY_RULE
def test_the_compiler_and_vmap_draw_what_a_plain_call_draws(backward):
    torch.compiler.reset()
    call = lambda logits: one_hot_sample(logits, backward)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    logits = draw(50, 4).requires_grad_()
    found = []
    for way in (call, compiled):
        with streams_put_back(0):
            found.append(way(logits))
    assert torch.equal(*found)
    (found[1] * torch.arange(4.0)).sum().backward()
    assert logits.grad.isfinite().all()
    with streams_put_back(0):
        same = torch.vmap(call, randomness="same")(logits.detach().expand(3, -1, -1))
    assert torch.equal(same, found[0].expand(3, -1, -1))


class Latent(nn.Module):
    """Quantized layers about two draws."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        with torch.no_grad():
            for seed, param in enumerate(self.parameters()):
                param.copy_(draw(*param.shape, seed=seed))

    def forward(self, x):
        for layer in self.layers[:2]:
            logits = layer(x).unflatten(-1, (2, 4))
            x = one_hot_sample(logits, "gumbel_rao", samples=3).flatten(-2)
        return self.layers[2](x).square().mean()


@pytest.mark.parametrize("evaluate", WAYS)
def test_probes_replay_the_draws_of_the_forward_pass(evaluate):
    model, x = fogzo.quantize_(Latent(), fogzo.fixed(2), everything), draw(16, 8)
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, noise_share=0.1, evaluate=evaluate)
    with estimator.record_rng():
        loss = model(x)
    loss.backward()
    # It fails unless the second draw is the same, whatever the first one's backward pass has drawn.
    assert estimator.refine_grads_(lambda: model(x), expected_loss=loss).probe_losses


def test_a_recomputed_forward_pass_draws_again_what_it_drew():
    logits = draw(30, 4).requires_grad_()
    rule = lambda x: one_hot_sample(x * 1, "reinmax") * torch.arange(4.0)  # noqa: E731
    grads = []
    for way in (rule, lambda x: checkpoint(rule, x, use_reentrant=False)):
        with streams_put_back(0):
            grads.append(torch.autograd.grad(way(logits).sum(), logits)[0])
    assert torch.equal(*grads)


def test_the_gradient_of_a_gradient_is_refused():
    logits = draw(3, 4).requires_grad_()
    total = (one_hot_sample(logits) * logits).sum()
    (grad,) = torch.autograd.grad(total, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backward": "gumbel"}, "one of gumbel_rao, reinmax, st, got 'gumbel'"),
        ({"temperature": 0}, "temperature must be a positive, finite number, got 0"),
        ({"temperature": torch.nan}, "temperature must be a positive"),
        ({"samples": 0, "backward": "gumbel_rao"}, "samples must be an integer, 1 or more, got 0"),
        ({"samples": 2.5, "backward": "gumbel_rao"}, "samples must be an integer"),
        ({"backward": "st", "samples": 10}, r"samples=10 are of \"gumbel_rao\" alone"),
        ({"logits": torch.zeros(3, 1)}, r"two categories or more, got the shape \(3, 1\)"),
        ({"logits": torch.tensor(0.0)}, "two categories or more"),
        ({"logits": torch.zeros(3, 2).long()}, "floating-point numbers, got torch.int64"),
        ({"logits": [0.0, 1.0]}, "floating-point numbers, got list"),
        ({"logits": torch.tensor([0.0, -torch.inf])}, "NaN or infinity.*masked_fill"),
        ({"logits": torch.tensor([0.0, torch.nan])}, "set_detect_anomaly"),
    ],
)
def test_a_mistake_is_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        one_hot_sample(**{"logits": torch.zeros(3, 2)} | arguments)


@pytest.mark.parametrize("law", [Uniform(), Triangular(2.0), Rademacher()], ids=str)
def test_a_law_that_ends_is_refused(law):
    with pytest.raises(ValueError, match=r"unbounded support.*Logistic\(tau=2\.0\)"):
        draw_levels(torch.zeros(3), uniform(2), law)


@pytest.mark.parametrize("x", [torch.arange(3), [0.0, 1.0]], ids=["integers", "a list"])
def test_weights_that_are_no_floating_point_numbers_are_refused(x):
    with pytest.raises(ValueError, match=r"x must be .* got (torch\.int64|list): draw_levels\("):
        draw_levels(x, uniform(2), Logistic(tau=2.0))


def test_a_draw_of_another_shape_is_refused():
    logits = torch.zeros(3, 4)
    conditional_gumbels(logits, torch.nn.functional.one_hot(torch.tensor([0, 1, 3]), 4))
    for one_hot in (torch.ones(3, 1), torch.tensor([0, 1, 3])):
        with pytest.raises(ValueError, match=r"one_hot must have the shape \(3, 4\)"):
            conditional_gumbels(logits, one_hot)
