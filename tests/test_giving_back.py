"""Everything borrowed comes back bit for bit, and the pitfalls of a training loop."""

import copy
import math
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo

PRESETS = {
    "fixed": lambda: fogzo.fixed(2),
    "lsq": lambda: fogzo.lsq(2),
    "quest": lambda: fogzo.quest(2),
    "ternary": lambda: fogzo.ternary(),
}
DYNAMIC = ["quest", "ternary"]


class Net(nn.Module):
    """Two quantized layers, one plain head, batch statistics, dropout and a buffer of its own."""

    def __init__(self, dropout=0.3, norm=True, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=dtype)
        self.norm = nn.BatchNorm1d(8, dtype=dtype) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, 8, dtype=dtype)
        self.head = nn.Linear(8, 3, dtype=dtype)
        self.register_buffer("seen", torch.zeros(2, dtype=dtype))
        stream = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape, generator=stream))

    def forward(self, x):
        h = self.dropout(self.norm(self.first(x)).tanh())
        return self.head(self.second(h).tanh())


def batch(rows=16, dtype=torch.float32, seed=1):
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=stream).to(dtype)
    return x, torch.randn(rows, 3, generator=stream).to(dtype)


def quantized_net(preset="fixed", **options):
    return fogzo.quantize_(Net(**options), PRESETS[preset]())


@contextmanager
def streams_put_back():
    """Let a test draw from the global streams without shifting those of other tests."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class Snapshot:
    """What a call may borrow."""

    def __init__(self, model):
        self.model = model
        self.params = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.grads = {
            n: (p.grad, None if p.grad is None else p.grad.clone())
            for n, p in model.named_parameters()
        }
        self.buffers = {n: (b, b.clone()) for n, b in model.named_buffers()}
        self.modes = [m.training for m in model.modules()]
        self.torch = torch.get_rng_state()
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.grad_mode = torch.is_grad_enabled()

    def assert_same(self, rewritten=()):
        """Everything is bit for bit as it was, but the gradients of the ``rewritten``."""
        for name, p in self.model.named_parameters():
            assert_bits_equal(p, self.params[name])
            grad, copied = self.grads[name]
            assert p.grad is grad, f"{name}.grad is another tensor"
            if grad is not None and name not in rewritten:
                assert_bits_equal(grad, copied)
        assert dict(self.model.named_buffers()).keys() == self.buffers.keys()
        for name, b in self.model.named_buffers():
            assert b is self.buffers[name][0], f"{name} is another tensor"
            assert_bits_equal(b, self.buffers[name][1])
        assert [m.training for m in self.model.modules()] == self.modes
        assert torch.equal(torch.get_rng_state(), self.torch)
        assert random.getstate() == self.python
        now = np.random.get_state()
        assert now[2:] == self.numpy[2:]
        assert (now[1] == self.numpy[1]).all()
        assert torch.is_grad_enabled() == self.grad_mode


def assert_bits_equal(a, b):
    # torch.equal calls NaN different from itself, and 0 equal to -0.
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.detach().view(kind), b.detach().view(kind))


class Vandal:
    """A closure that disturbs all it can reach, and ends as it is told at a given call."""

    def __init__(self, model, loss_of, ending="returns", at=0):
        self.model, self.loss_of, self.ending, self.at, self.calls = model, loss_of, ending, at, 0

    def __call__(self):
        loss = self.loss_of()
        random.random()
        np.random.rand(3)
        torch.rand(5)
        self.model.seen.add_(1)
        self.model.seen = torch.full_like(self.model.seen, 7.0)
        if isinstance(self.model.norm, nn.BatchNorm1d):
            self.model.norm.running_mean = self.model.norm.running_mean * 3 + 1
        self.model.eval()
        self.model.dropout.train()
        self.calls += 1
        if self.calls > self.at:
            if self.ending == "raises":
                raise OSError("disk gone")
            if self.ending == "is interrupted":
                raise KeyboardInterrupt
            if self.ending == "returns NaN":
                return loss * math.nan
        return loss


def backward(model, loss_of):
    loss = loss_of()
    loss.backward()
    return loss


@pytest.fixture(autouse=True)
def _clean_streams():
    with streams_put_back():
        yield


# Everything comes back


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("ending", "at"),
    [("returns", 0), ("returns NaN", 0), ("returns NaN", 3)]
    + [(ending, at) for ending in ("raises", "is interrupted") for at in range(5)],
)
def test_all_that_was_borrowed_comes_back(preset, ending, at):
    model = quantized_net(preset)
    x, y = batch()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=2, noise_share=0.2)
    with estimator.record_rng():
        loss = backward(model, lambda: mse_loss(model(x), y))
    closure = Vandal(model, lambda: mse_loss(model(x), y), ending, at)
    before = Snapshot(model)
    steps = [w.step_size().clone() for w in weights]
    if ending in ("raises", "is interrupted"):
        error = OSError if ending == "raises" else KeyboardInterrupt
        with pytest.raises(error):
            estimator.refine_grads_(closure, expected_loss=loss)
        before.assert_same()
        assert estimator.step == 0
    elif ending == "returns NaN":
        with pytest.warns(RuntimeWarning, match="not finite"):
            stats = estimator.refine_grads_(closure, expected_loss=loss)
        before.assert_same()
        assert stats.fallback
    else:
        stats = estimator.refine_grads_(closure, expected_loss=loss)
        before.assert_same(rewritten={w.name for w in weights})
        assert stats.fallback is None
    for w, step in zip(weights, steps, strict=True):
        assert torch.equal(w.step_size(), step)


def test_a_hand_written_quantizers_model_is_protected_if_it_is_named():
    x, y = batch()
    model = Net()
    triples = [("first", model.first.weight, 0.5), ("second", model.second.weight, 0.5)]
    backward(model, lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    estimator = fogzo.FogzoEstimator(triples, model=model, noise_share=0.1)
    estimator.refine_grads_(Vandal(model, lambda: mse_loss(model(x), y)))
    before.assert_same(rewritten={"first.weight", "second.weight"})


@pytest.mark.parametrize("cls", [fogzo.SpsaEstimator, fogzo.ControlVariateEstimator])
def test_the_other_estimators_give_everything_back_too(cls):
    x, y = batch()
    model = quantized_net("quest")
    weights = fogzo.quantized_weights(model)
    backward(model, lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    cls(weights, num_samples=2).refine_grads_(Vandal(model, lambda: mse_loss(model(x), y)))
    before.assert_same(rewritten={w.name for w in weights})


def test_weights_come_back_exactly_after_many_steps_without_an_optimizer():
    # +eps v, -2 eps v, +eps v would have drifted by now.
    x, y = batch()
    model = quantized_net(dropout=0.0).to(torch.bfloat16)
    x, y = x.bfloat16(), y.bfloat16()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, noise_share=0.1)
    before = [w.param.detach().clone() for w in weights]
    for _ in range(20):
        model.zero_grad()
        backward(model, lambda: mse_loss(model(x), y))
        estimator.refine_grads_(lambda: mse_loss(model(x).float(), y.float()))
    for w, b in zip(weights, before, strict=True):
        assert_bits_equal(w.param, b)


@pytest.mark.parametrize("preset", DYNAMIC)
@pytest.mark.parametrize("raises", [False, True])
def test_measured_step_sizes_stand_still_while_the_weights_move(preset, raises):
    x, y = batch()
    model = quantized_net(preset, dropout=0.0)
    weights = fogzo.quantized_weights(model)
    steps = [w.step_size().clone() for w in weights]
    estimator = fogzo.FogzoEstimator(weights, noise_share=0.5)
    calls = []

    def closure():
        calls.append(0)
        moved = [not torch.equal(w.param, p) for w, p in zip(weights, latent, strict=True)]
        assert all(moved)
        for w, step in zip(weights, steps, strict=True):
            assert torch.equal(w.step_size(), step)
        if raises and len(calls) == 2:
            raise OSError
        return mse_loss(model(x), y)

    backward(model, lambda: mse_loss(model(x), y))
    latent = [w.param.detach().clone() for w in weights]
    if raises:
        with pytest.raises(OSError):
            estimator.refine_grads_(closure)
    else:
        estimator.refine_grads_(closure)
    with torch.no_grad():
        for w, step in zip(weights, steps, strict=True):
            w.param.mul_(2)
            torch.testing.assert_close(w.step_size(), 2 * step)


@pytest.mark.parametrize("raises", [False, True])
def test_a_hand_written_freezing_context_is_entered_and_left(raises):
    events = []

    @contextmanager
    def frozen():
        events.append("in")
        try:
            yield
        finally:
            events.append("out")

    model = nn.Linear(4, 2)
    record = fogzo.QuantizedWeight("w", model.weight, lambda: torch.tensor(0.5), frozen_step=frozen)
    estimator = fogzo.FogzoEstimator([record], noise_share=0.1)
    x = torch.ones(3, 4)
    model(x).square().mean().backward()

    def closure():
        assert events == ["in"]
        if raises:
            raise OSError
        return model(x).square().mean()

    if raises:
        with pytest.raises(OSError):
            estimator.refine_grads_(closure)
    else:
        estimator.refine_grads_(closure)
    assert events == ["in", "out"]


# Random streams


class RandomDepth(nn.Module):
    """Draws from all three global streams, as dropout, LayerDrop and SpecAugment do."""

    def forward(self, x):
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return x * scale


def noisy_net():
    model = quantized_net()
    model.norm = nn.Sequential(model.norm, RandomDepth())
    return model


def train(with_fogzo, steps=3):
    model = noisy_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), num_samples=2, noise_share=0.3)
    losses = []
    for step in range(steps):
        x, y = batch(seed=step)
        with estimator.record_rng():
            loss = backward(model, lambda: mse_loss(model(x), y))
        if with_fogzo:
            estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    buffers = [b.clone() for b in model.buffers()]
    return losses, buffers, [torch.rand(4).tolist(), random.random(), np.random.rand(4).tolist()]


@pytest.mark.filterwarnings("ignore:no weight rounds differently:RuntimeWarning")
def test_a_run_with_fogzo_meets_the_same_random_numbers_and_batch_statistics_as_one_without():
    start = torch.get_rng_state(), random.getstate(), np.random.get_state()
    without = train(False)
    torch.set_rng_state(start[0])
    random.setstate(start[1])
    np.random.set_state(start[2])
    with_it = train(True)
    assert without[0] == with_it[0]
    assert without[2] == with_it[2]
    for a, b in zip(without[1], with_it[1], strict=True):
        assert_bits_equal(a, b)


def test_recorded_streams_make_the_probe_at_the_unperturbed_weights_equal_the_backwards_loss():
    model = noisy_net()
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    seen = []

    def closure():
        seen.append(mse_loss(model(x), y))
        return seen[-1]

    with estimator.record_rng():
        loss = backward(model, lambda: mse_loss(model(x), y))
    estimator.refine_grads_(closure, expected_loss=loss)
    assert seen[0].item() == loss.item()
    assert len(seen) == 3


def test_without_recording_other_dropout_masks_are_caught_and_the_remedy_is_named():
    model = quantized_net(dropout=0.5, norm=False)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    loss = backward(model, lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"with estimator.record_rng\(\): loss"):
        estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss)
    before.assert_same()


def test_a_recording_serves_one_step_only():
    model = quantized_net(dropout=0.5, norm=False)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    with estimator.record_rng():
        recorded = torch.get_rng_state()
        backward(model, lambda: mse_loss(model(x), y))
    states = []

    def closure():
        states.append(torch.get_rng_state())
        return mse_loss(model(x), y)

    estimator.refine_grads_(closure)
    backward(model, lambda: mse_loss(model(x), y))
    estimator.refine_grads_(closure)
    assert all(torch.equal(s, recorded) for s in states[:2])
    assert all(torch.equal(s, torch.get_rng_state()) for s in states[2:])


def test_all_probes_of_a_step_see_the_same_random_numbers_without_any_recording():
    model = quantized_net()
    x, y = batch()
    backward(model, lambda: mse_loss(model(x), y))
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), num_samples=2, noise_share=0.3)
    draws = []

    def closure():
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return mse_loss(model(x), y)

    for _ in range(3):
        draws.clear()
        estimator.refine_grads_(closure)
        assert len(draws) == 4
        assert len(set(draws)) == 1
        backward(model, lambda: mse_loss(model(x), y))


def test_a_closure_that_begins_to_draw_from_numpy_late_is_replayed_too():
    # Masking in the input that starts after a warm-up, or with a probability.
    model = quantized_net(dropout=0.0)
    x, y = batch()
    backward(model, lambda: mse_loss(model(x), y))
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), num_samples=2, noise_share=0.3)
    for _ in range(2):
        estimator.refine_grads_(lambda: mse_loss(model(x), y))
        backward(model, lambda: mse_loss(model(x), y))
    draws = []

    def closure():
        draws.append(np.random.rand())
        return mse_loss(model(x), y)

    before = Snapshot(model)
    estimator.refine_grads_(closure)
    before.assert_same(rewritten={"first.weight", "second.weight"})
    assert len(set(draws)) == 1


# Modes, gradient mode, and what else a closure may leave behind


def test_probes_run_in_train_mode_without_gradient():
    model = quantized_net()
    x, y = batch()
    backward(model, lambda: mse_loss(model(x), y))

    def closure():
        assert model.training
        assert model.norm.training
        assert not torch.is_grad_enabled()
        return mse_loss(model(x), y)

    fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3).refine_grads_(closure)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("ending", ["returns", "raises"])
def test_a_closure_cannot_leak_the_gradient_mode(enabled, ending):
    model = quantized_net()
    x, y = batch()
    weights = fogzo.quantized_weights(model)
    backward(model, lambda: mse_loss(model(x), y))

    def closure():
        torch.set_grad_enabled(True)
        if ending == "raises":
            raise OSError
        return mse_loss(model(x), y)

    estimator = fogzo.FogzoEstimator(weights, num_samples=2)
    try:
        with torch.set_grad_enabled(enabled):
            before = Snapshot(model)
            if ending == "raises":
                with pytest.raises(OSError):
                    estimator.refine_grads_(closure)
                before.assert_same()
            else:
                estimator.refine_grads_(closure)
                before.assert_same(rewritten={w.name for w in weights})
    finally:
        torch.set_grad_enabled(True)


def test_a_closure_may_run_in_inference_mode():
    model = quantized_net()
    x, y = batch()
    weights = fogzo.quantized_weights(model)
    backward(model, lambda: mse_loss(model(x), y))
    before = Snapshot(model)

    @torch.inference_mode()
    def closure():
        return mse_loss(model(x), y)

    fogzo.FogzoEstimator(weights).refine_grads_(closure)
    before.assert_same(rewritten={w.name for w in weights})


@pytest.mark.parametrize("ending", ["returns", "calls backward"])
def test_a_closure_that_clears_the_gradients_cannot_lose_them(ending):
    # torch.optim's own closures begin with zero_grad() and end with backward().
    model = quantized_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    weights = fogzo.quantized_weights(model)
    backward(model, lambda: mse_loss(model(x), y))
    before = Snapshot(model)

    def closure():
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        if ending == "calls backward":
            loss.backward()
        return loss

    estimator = fogzo.FogzoEstimator(weights)
    if ending == "calls backward":
        with pytest.raises((RuntimeError, ValueError)):
            estimator.refine_grads_(closure)
        before.assert_same()
    else:
        estimator.refine_grads_(closure)
        before.assert_same(rewritten={w.name for w in weights})


def test_the_optimizer_of_the_reading_loop_steps_afterwards():
    model = quantized_net("lsq")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    before = [p.detach().clone() for p in model.parameters()]
    with estimator.record_rng():
        loss = backward(model, lambda: mse_loss(model(x), y))
    estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss)
    optimizer.step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(moved)


# Mixed precision


def test_one_shared_autocast_block_does_not_hide_the_perturbation():
    # Inside it, autocast caches the bfloat16 copy of a raw weight that was made at first use.
    linear = nn.Linear(6, 3)
    x, y = batch()
    triples = [("w", linear.weight, 0.5)]
    estimator = fogzo.FogzoEstimator(triples, noise_share=0.5, model=linear)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mse_loss(linear(x).float(), y)
        loss.backward()
        stats = estimator.refine_grads_(lambda: mse_loss(linear(x).float(), y), expected_loss=loss)
        after = mse_loss(linear(x).float(), y)
    plus, minus = stats.probe_losses
    assert len({plus, minus, loss.item()}) == 3
    assert after.item() == loss.item()


def test_an_error_in_a_shared_autocast_block_leaves_no_perturbed_cast_behind():
    linear = nn.Linear(6, 3)
    x, y = batch()
    estimator = fogzo.FogzoEstimator([("w", linear.weight, 0.5)], noise_share=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mse_loss(linear(x).float(), y)
        loss.backward()

        def closure():
            with torch.enable_grad():
                linear(x)
            raise OSError

        with pytest.raises(OSError):
            estimator.refine_grads_(closure)
        assert mse_loss(linear(x).float(), y).item() == loss.item()


def refined_with_scale(scale, told, num_samples=2, preset="lsq"):
    model = quantized_net(preset, dropout=0.0)
    x, y = batch()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=num_samples, noise_share=0.05)
    (scale * mse_loss(model(x), y)).backward()
    estimator.refine_grads_(lambda: mse_loss(model(x), y), grad_scale=told)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_of_a_grad_scaler_give_the_same_result_at_their_scale(preset):
    plain = refined_with_scale(1.0, 1.0, preset=preset)
    scaled = refined_with_scale(65536.0, 65536.0, preset=preset)
    for p, s in zip(plain, scaled, strict=True):
        assert_bits_equal(s, p * 65536)
        assert_bits_equal(s / 65536, p)


@pytest.mark.parametrize("cls", [fogzo.PlaceboEstimator, fogzo.ControlVariateEstimator])
def test_every_estimator_understands_the_scale(cls):
    results = []
    for scale in (1.0, 65536.0):
        model = quantized_net(dropout=0.0)
        x, y = batch()
        (scale * mse_loss(model(x), y)).backward()
        estimator = cls(fogzo.quantized_weights(model), num_samples=2)
        stats = estimator.refine_grads_(lambda: mse_loss(model(x), y), grad_scale=scale)
        results.append(([p.grad / scale for p in model.parameters()], stats.gradient_norm))
    (plain, norm), (scaled, scaled_norm) = results
    assert norm == scaled_norm
    for p, s in zip(plain, scaled, strict=True):
        torch.testing.assert_close(p, s, rtol=1e-6, atol=0)


def test_a_scale_that_nobody_mentioned_is_warned_about_once():
    model = quantized_net(dropout=0.0)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    (65536 * mse_loss(model(x), y)).backward()
    with pytest.warns(RuntimeWarning, match=r"scaler.unscale_\(optimizer\).*grad_scale=") as told:
        estimator.refine_grads_(lambda: mse_loss(model(x), y))
    assert len(told) == 1
    model.zero_grad()
    (65536 * mse_loss(model(x), y)).backward()
    estimator.refine_grads_(lambda: mse_loss(model(x), y))  # warnings are errors here


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_gradients_that_are_not_finite_are_left_to_the_scaler(value):
    model = quantized_net()
    x, y = batch()
    backward(model, lambda: mse_loss(model(x), y))
    model.second.weight.grad[1, 2] = value
    before = Snapshot(model)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    stats = estimator.refine_grads_(lambda: mse_loss(model(x), y))
    before.assert_same()
    assert "not finite" in stats.fallback
    assert estimator.step == 1
    assert stats.agreement is None


def test_a_gradient_of_zeros_is_left_alone():
    model = quantized_net()
    x, y = batch()
    backward(model, lambda: mse_loss(model(x), y))
    for w in fogzo.quantized_weights(model):
        w.param.grad.zero_()
    before = Snapshot(model)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    stats = estimator.refine_grads_(lambda: mse_loss(model(x), y))
    before.assert_same()
    assert "zero" in stats.fallback


# Agreement with the ordinary gradient


def test_without_quantizer_and_noise_the_refined_gradient_is_the_gradient():
    model = Net(dropout=0.4)
    x, y = batch(64)
    triples = [(f"{n}.weight", getattr(model, n).weight, 1e-1) for n in ("first", "second", "head")]
    estimator = fogzo.FogzoEstimator(triples, noise_share=0.0, model=model)
    with estimator.record_rng():
        loss = backward(model, lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    given = torch.cat([p.grad.flatten().clone() for _, p, _ in triples])
    stats = estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss)
    refined = torch.cat([p.grad.flatten() for _, p, _ in triples])
    assert (refined - given).norm() < 1e-3 * given.norm()
    assert stats.agreement == pytest.approx(1, abs=1e-3)
    before.assert_same(rewritten={n for n, _, _ in triples})


def test_gradients_keep_their_storage_in_a_bucket():
    # DDP's gradient_as_bucket_view: all gradients are views of one flat tensor.
    model = quantized_net("lsq", dropout=0.0)
    reference = copy.deepcopy(model)
    x, y = batch()
    params = list(model.parameters())
    bucket = torch.zeros(sum(p.numel() for p in params))
    start = 0
    for p in params:
        p.grad = bucket[start : start + p.numel()].view_as(p)
        start += p.numel()
    addresses = [p.grad.data_ptr() for p in params]
    for m in (model, reference):
        mse_loss(m(x), y).backward()
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(m), num_samples=2, noise_share=0.1)
        estimator.refine_grads_(lambda m=m: mse_loss(m(x), y))
    assert [p.grad.data_ptr() for p in params] == addresses
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert torch.equal(bucket, expected)


def test_accumulated_micro_batches_equal_one_large_batch():
    x, y = batch(24, torch.float64)
    windows = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 24, 6)]
    gradients = []
    for micro_batches in ([(x, y)], windows):
        model = quantized_net("lsq", dropout=0.0, norm=False, dtype=torch.float64)
        estimator = fogzo.FogzoEstimator(
            fogzo.quantized_weights(model), num_samples=2, noise_share=0.1
        )

        def step_loss(model=model, micro_batches=micro_batches):
            total = 0.0
            for a, b in micro_batches:
                loss = mse_loss(model(a), b) / len(micro_batches)
                if torch.is_grad_enabled():
                    loss.backward()
                total = total + loss.detach()
            return total

        estimator.refine_grads_(step_loss, expected_loss=step_loss())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_a_weight_that_took_no_part_is_left_alone():
    model = quantized_net(dropout=0.0)
    x, y = batch()
    backward(model, lambda: mse_loss(model(x), y))
    model.second.weight.grad = None  # an expert that no token chose
    unused = model.second.weight.detach().clone()
    given = model.first.weight.grad.clone()

    def closure():
        assert_bits_equal(model.second.weight, unused)
        return mse_loss(model(x), y)

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    stats = estimator.refine_grads_(closure)
    assert stats.fallback is None
    assert model.second.weight.grad is None
    assert not torch.equal(model.first.weight.grad, given)


def test_batch_statistics_outside_the_quantized_part_are_protected_if_the_model_is_named():
    class Whole(Net):
        def __init__(self):
            super().__init__()
            self.backbone = quantized_net()

        def forward(self, x):
            return self.head(self.norm(self.backbone.second(self.backbone.first(x))))

    x, y = batch()
    model = Whole()
    weights = fogzo.quantized_weights(model.backbone)
    backward(model, lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    estimator = fogzo.FogzoEstimator(weights, model=model)
    estimator.refine_grads_(lambda: mse_loss(model(x), y))
    before.assert_same(rewritten={"backbone.first.weight", "backbone.second.weight"})
    assert model.norm.num_batches_tracked == 1


def test_a_first_step_that_overflows_does_not_use_up_the_warning_about_a_forgotten_scale():
    # A GradScaler starts high, so its first steps are the ones that overflow.
    model = quantized_net(dropout=0.0)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    backward(model, lambda: mse_loss(model(x), y))
    model.first.weight.grad.fill_(math.inf)
    assert estimator.refine_grads_(lambda: mse_loss(model(x), y)).fallback
    model.zero_grad()
    (65536 * mse_loss(model(x), y)).backward()
    with pytest.warns(RuntimeWarning, match="unscale_"):
        estimator.refine_grads_(lambda: mse_loss(model(x), y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_come_back_exactly_after_the_model_was_cast_between_steps(dtype):
    model = quantized_net(dropout=0.0)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    for cast in (torch.float32, dtype):
        model.to(cast)
        model.zero_grad()
        x, y = batch(dtype=cast)
        if cast == torch.float64:
            with torch.no_grad():
                model.first.weight.add_(1e-12)  # what float32 cannot hold
        backward(model, lambda: mse_loss(model(x), y))
        before = Snapshot(model)
        estimator.refine_grads_(lambda: mse_loss(model(x).float(), y.float()))
        before.assert_same(rewritten={"first.weight", "second.weight"})
