"""Bell Box Quantization, and QuEST with a gradient through its scale."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from fogzo.quantizers import Bell, Quantizer, learned_scale, rms_scale, uniform
from fogzo.quantizers.scales import Scale

F64 = torch.float64
FOLLOWING = {"detach_scale": False, "granularity": "tensor"}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def quantiles(count):
    """An exact Gaussian sample."""
    ranks = (torch.arange(count, dtype=F64) + 0.5) / count
    z = math.sqrt(2) * torch.erfinv(2 * ranks - 1)
    return z.reshape(1, -1)


def plain(bits, levels=None):
    """BBQ without its rotation, for weights that are Gaussian already."""
    scale = Scale("bell", "dynamic")
    return Quantizer(uniform(bits, levels), scale, "identity_unmasked", companding=Bell())


def entropy(codes):
    share = torch.bincount((codes - codes.min()).long().flatten()).double()
    share = share[share > 0] / share.sum()
    return float(-(share * share.log2()).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_all_codes_are_equally_frequent(bits):
    w = quantiles(2**16)
    codes = plain(bits).codes(w)
    assert (
        torch.bincount((codes - codes.min()).long().flatten()).tolist() == [2**16 >> bits] * 2**bits
    )
    assert entropy(codes) == pytest.approx(bits, abs=1e-12)


def test_quests_codes_are_not():
    quantizer = Quantizer(uniform(2, "half"), rms_scale("quest"), "trust")
    assert entropy(quantizer.codes(quantiles(2**16))) == pytest.approx(1.9037, abs=5e-5)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3657), (2, 0.1446), (3, 0.0743), (4, 0.0536)])
def test_the_squared_error_is_the_known_one(bits, error):
    w = quantiles(2**18)
    squared = (plain(bits, "half")(w) - w).square().mean().item()
    assert squared == pytest.approx(error, abs=5e-4)
    if bits > 2:  # as published, shifted by half a step
        shift = (1.694 / 2**bits) ** 2
        squared = (plain(bits)(w) - w).square().mean().item()
        assert squared == pytest.approx(error + shift, abs=5e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_values_and_gradients_are_the_formulas(bits):
    w = gaussian(4, 64).requires_grad_()
    step = torch.tensor([[0.3], [0.5], [0.7], [1.1]], dtype=F64, requires_grad=True)
    quantizer = Quantizer(
        uniform(bits),
        learned_scale("bell"),
        "identity_unmasked",
        None,
        "channel",
        companding=Bell(),
    )
    weight = gaussian(4, 64, seed=1)
    (quantizer(w, step) * weight).sum().backward()

    latent = w.detach().clone().requires_grad_()
    s = step.detach().clone().requires_grad_()
    t = latent / latent.square().mean(1, keepdim=True).sqrt()
    y = 2**bits * 0.5 * (1 + torch.erf(t / math.sqrt(2))) - 0.5
    k = y + (y.round().clamp(0, 2**bits - 1) - y).detach()
    z = -0.5 if bits <= 2 else 0.0
    expected = s * (k - 2 ** (bits - 1) - z)
    assert torch.allclose(quantizer(w, step), expected, atol=1e-12)
    (expected * weight).sum().backward()
    assert torch.allclose(w.grad, latent.grad, atol=1e-10)
    scale = quantizer.scale.grad_scale(64, quantizer.grid)
    assert torch.allclose(step.grad, s.grad * scale, atol=1e-10)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_cell_is_the_inverse_slope_of_the_curve(bits):
    w, rms = quantiles(4096), 3.0
    w = w * rms / w.square().mean().sqrt()
    cell = plain(bits).step_size(w)
    density = torch.exp(-0.5 * (w / rms).square()) / math.sqrt(2 * math.pi)
    last = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 / 2**bits, dtype=F64))
    inside = w.abs() <= rms * last
    slope = 2**bits * density / rms
    assert torch.allclose((1 / cell)[inside], slope[inside], rtol=1e-6)
    assert (cell[~inside] == cell.max()).all()


@pytest.mark.parametrize("learned", [True, False])
def test_a_network_of_it_trains_and_bakes_in(learned):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    fogzo.quantize_(
        model,
        fogzo.bbq(2, learned=learned),
        lambda *_: True,
        fogzo.bbq(4, granularity="tensor", learned=learned),
    )
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(60):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step % 4))
        optimizer.zero_grad()
        loss = mse_loss(model(x), x[:, :4])
        loss.backward()
        closure = lambda x=x: mse_loss(model(x), x[:, :4])  # noqa: E731
        stats = estimator.refine_grads_(closure, expected_loss=loss)
        optimizer.step()
        losses.append(loss.item())
        assert stats.fallback is None
    assert losses[-1] < 0.7 * losses[0]
    layer = model[0]
    weight = layer.quantized_weight().detach()
    step = layer.quantizer.current_step_size(layer.weight, layer._step())
    assert torch.equal(layer.quantizer.dequantize(layer.codes(), step, dtype=weight.dtype), weight)
    assert len(layer.codes().unique()) == 4
    x = torch.randn(8, 16)
    fogzo.dequantize_(model)
    assert torch.equal(model[0].weight, weight)


def test_a_pull_to_its_levels_is_refused():
    model = fogzo.quantize_(nn.Sequential(nn.Linear(8, 8)), fogzo.bbq(2), lambda *_: True)
    with pytest.raises(ValueError, match=r"not evenly spaced.*fogzo.quest\(2\)"):
        fogzo.methods.GridPull(model, 0.5)


@pytest.mark.parametrize("make", [fogzo.bbq, lambda bits: fogzo.quest(bits, detach_scale=False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_half_precision_stay_finite(make, dtype):
    w = gaussian(4, 32).to(dtype)
    w[1] = 0
    w.requires_grad_()
    quantizer = make(2)
    step = quantizer.initial_step_size(w.detach())
    quantized = quantizer(w, step)
    quantized.square().sum().backward()
    assert quantized.dtype == dtype and quantized.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("make", [fogzo.bbq, lambda bits, **_: fogzo.quest(bits, **FOLLOWING)])
def test_a_norm_beyond_float16_follows_the_inputs_too(make):
    quantizer = make(2, learned=False, granularity="tensor")
    wide = (200 * gaussian(512, 512)).requires_grad_()  # of norm 100,000
    half = wide.detach().half().requires_grad_()
    for x in (wide, half):
        quantizer.quantize_input(x).double().square().mean().backward()
    assert (half.grad - wide.grad).norm() < 0.1 * wide.grad.norm()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_quest_with_a_gradient_through_its_scale(bits):
    w, weight = gaussian(4, 64).requires_grad_(), gaussian(4, 64, seed=1)
    through = Quantizer(
        uniform(bits, "half"), rms_scale("quest", detached=False), "trust", None, "channel"
    )
    detached = Quantizer(uniform(bits, "half"), rms_scale("quest"), "trust", None, "channel")
    assert torch.equal(through(w), detached(w))
    (through(w) * weight).sum().backward()

    latent = w.detach().clone().requires_grad_()
    grid = uniform(bits, "half")
    edge = {1: 0.7978845, 2: 1.4935346, 4: 2.5139306}[bits]
    step = edge * latent.square().mean(1, keepdim=True).sqrt() / grid.high
    x = latent / step
    clipped = x.clamp(grid.low - 0.5, grid.high + 0.5)
    expected = step * (clipped + (grid.round(x) - clipped).detach())
    (expected * weight).sum().backward()
    assert torch.allclose(through(w), expected, atol=1e-7)
    assert torch.allclose(w.grad, latent.grad, atol=1e-7)


def test_the_presets_are_these():
    assert not fogzo.quest(2, detach_scale=False).scale.detached
    assert fogzo.quest(2).scale.detached
    with pytest.raises(ValueError, match=r"dynamic multiples of the rms only.*detached=False"):
        Scale("max", "dynamic", detached=False)
    with pytest.raises(ValueError, match="dynamic multiples of the rms only"):
        Scale("quest", "fixed", detached=False)
    with pytest.raises(ValueError, match="companding must be of type Bell or None"):
        Quantizer(uniform(2), rms_scale(), companding=2)


@pytest.mark.parametrize("bits", [1.585, 2])
def test_the_half_grid_holds_paretoqs_stretched_levels(bits):
    grid = fogzo.quantizers.TERNARY if bits < 2 else uniform(2, "half")
    quantizer = Quantizer(grid, learned_scale("range"), "trust", None, "channel")
    w = gaussian(4, 64)
    a = w.abs().amax(1, keepdim=True)
    n, s = (1.5, 0.0) if bits < 2 else (2.0, 0.5)
    expected = a * (((w / a).clamp(-0.99, 0.99) * n - s).round() + s) / n
    assert torch.allclose(quantizer(w, quantizer.initial_step_size(w)), expected, atol=1e-12)


def test_the_authors_vision_models_have_wider_levels_that_follow_the_rms():
    quantizer = fogzo.bbq(2, block=32, init="bell_wide", learned=False)
    assert quantizer.rotation.block == 32 and quantizer.granularity == "channel"
    w = gaussian(3, 64) * torch.tensor([[0.1], [1.0], [3.0]], dtype=F64)
    rms = w.square().mean(1, keepdim=True).sqrt()  # which a rotation keeps
    assert quantizer.initial_step_size(w) is None
    # s / 2^(b-1) with s = 2.45 rms.
    assert torch.allclose(quantizer.current_step_size(w), 2.45 * rms / 2, rtol=1e-6)
    w.requires_grad_()
    quantizer(w).sum().backward()
    assert w.grad.abs().min() > 0
