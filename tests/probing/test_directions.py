"""The noise of a direction: in weights and gradients alike, kept or drawn twice."""

import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from fogzo.probing import directions
from fogzo.probing.directions import Direction, Directions
from toolbox import PRESETS, draw, everything, fill, pairwise, quantized_net

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def prepared(preset, dtype, **options):
    model = fill(nn.Sequential(nn.Linear(64, 48))).to(dtype)
    fogzo.quantize_(model, PRESETS[preset](**options), everything)
    model(draw(8, 64).to(dtype)).square().mean().backward()
    (weight,) = fogzo.quantized_weights(model)
    return weight


def rotated(weight, tensor):
    return tensor if weight.rotate is None else weight.rotate(tensor)


def assert_rounded(actual, exact):
    """The exact numbers, rounded once; sums in another order leave a few in two hundred apart."""
    expected = exact.to(actual.dtype)
    scale = float(exact.abs().max())
    resolution = max(torch.finfo(actual.dtype).resolution, 1e-6)
    torch.testing.assert_close(actual, expected, rtol=10 * resolution, atol=resolution * scale)
    if actual.dtype.itemsize < 4:
        assert (actual == expected).double().mean() > 0.98


@pairwise(
    preset=["fixed", "fixed per channel", "lsq per group", "quest"],
    surrogate=["identity_unmasked", "tanh"],
    dtype=DTYPES,
    samples=[((0, 2.0),), ((0, 2.0), (1, -0.5))],
)
@torch.no_grad()
def test_the_noise_that_is_written_is_the_noise_that_was_probed(preset, surrogate, dtype, samples):
    with torch.enable_grad():
        weight = prepared(preset, dtype, surrogate=surrogate)
    found = Directions([weight], seed=1)
    u = {sample: found.noise(sample, 0) for sample, _ in samples}
    assert all(noise.dtype == torch.promote_types(dtype, torch.float32) for noise in u.values())
    eps = weight.step_size().double() * weight.surrogate.radius

    moved = weight.param.detach().clone()
    found.move_(moved, 0, Direction(0, 0.0, 0.25))
    offset = rotated(weight, 0.25 * eps * u[0].double())
    assert_rounded(moved, weight.param.double() + offset)

    found.write_grads_(0.0, samples)
    total = sum(factor * u[sample].double() for sample, factor in samples)
    assert_rounded(weight.param.grad, rotated(weight, total / eps))


@pairwise(
    preset=["lsq", "lsq per channel", "quest"],
    estimator=[fogzo.FogzoEstimator, fogzo.ControlVariateEstimator, fogzo.SpsaEstimator],
    num_samples=[1, 3],
    evaluate=["in_place", "lean", "stacked"],
)
def test_noise_that_is_kept_gives_the_step_of_noise_drawn_twice(
    preset, estimator, num_samples, evaluate, monkeypatch
):
    x, y = draw(16, 8), draw(16, 3)
    steps = []
    for kept in (directions._MOST_KEPT, 0):
        monkeypatch.setattr(directions, "_MOST_KEPT", kept)
        model = quantized_net(preset, dropout=0.0)
        weights = fogzo.quantized_weights(model)
        instance = estimator(weights, num_samples=num_samples, evaluate=evaluate)
        stats = []
        for _ in range(3):  # gradients add up, so that every step's stay to be seen
            mse_loss(model(x), y).backward()
            stats.append(instance.refine_grads_(lambda m=model: mse_loss(m(x), y)))
        steps.append((stats, [p.grad for p in model.parameters()]))
    (stats, grads), (others, other_grads) = steps
    assert stats == others
    assert all(step.fallback is None for step in stats)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def test_noise_is_kept_as_long_as_there_is_room_and_drawn_alike_after(monkeypatch):
    weight = prepared("lsq", torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(directions, "_MOST_KEPT", weight.param.numel())
        found = Directions([weight], seed=1)
    first, second = found.noise(0, 0), found.noise(1, 0)
    assert found.noise(0, 0) is first
    assert found.noise(1, 0) is not second
    assert torch.equal(found.noise(1, 0), second)
    assert not torch.equal(first, second)
