"""Noise that is kept as integers is, in weights and gradients, the noise that its law gives."""

import pytest
import torch
from fogzo.probing.noise import working_dtype
from torch import nn

import fogzo
from fogzo.probing.directions import Directions, Probe

PRESETS = {
    "fixed": lambda: fogzo.fixed(2),
    "fixed per channel": lambda: fogzo.fixed(4, granularity="channel"),
    "rotated": lambda: fogzo.quest(2),
    "no integers": lambda: fogzo.fixed(2, surrogate="approx_sign"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def prepared(preset, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
    fogzo.quantize_(model, PRESETS[preset](), lambda *_: True)
    model(torch.randn(8, 64, dtype=dtype)).square().mean().backward()
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("samples", [[(0, 2.0)], [(0, 2.0), (1, -0.5)]], ids=["one", "two"])
@torch.no_grad()
def test_the_noise_that_is_written_is_the_noise_that_was_probed(preset, dtype, samples):
    with torch.enable_grad():
        weight = prepared(preset, dtype)
    directions = Directions([weight], seed=1)
    u = {sample: next(directions.noise(sample)) for sample, _ in samples}
    assert all(noise.dtype == working_dtype(weight.param) for noise in u.values())
    eps = weight.step_size().double() * weight.surrogate.radius

    moved = weight.param.detach().clone()
    directions.move_(0, moved, Probe(0, 0.0, 0.25))
    offset = rotated(weight, 0.25 * eps * u[0].double())
    assert_rounded(moved, weight.param.double() + offset)

    directions.write_grads_(0.0, samples)
    total = sum(factor * u[sample].double() for sample, factor in samples)
    assert_rounded(weight.param.grad, rotated(weight, total / eps))
