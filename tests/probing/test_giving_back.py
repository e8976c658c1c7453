"""Everything borrowed comes back bit for bit, however probes are evaluated."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from toolbox import (
    EVERY_WAY,
    IN_16_BITS,
    WAYS,
    Net,
    Snapshot,
    Vandal,
    assert_bits_equal,
    backward,
    batch,
    draw,
    in_chunks_of,
    pairwise,
    quantized_net,
    streams_put_back,
)

# By chance some of these small networks' measured slopes are tiny, which is warned about.
pytestmark = pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning")

REWRITTEN = {"first.weight", "second.weight"}
CALLS = {"in_place": 7, "stacked": 5, "lean": 7}  # an audit, and both sides of three directions


@pytest.fixture(autouse=True)
def _clean_streams():
    with streams_put_back(seed=0):
        yield


def started(model, **options):
    """An estimator of the model after its backward pass, the closure, and backward's own loss."""
    x, y = batch()
    estimator = fogzo.FogzoEstimator(
        fogzo.quantized_weights(model), **{"noise_share": 0.3} | options
    )
    with estimator.record_rng():
        loss = backward(lambda: mse_loss(model(x), y))
    return estimator, lambda: mse_loss(model(x), y), loss


# Everything comes back


@pairwise(
    preset=["fixed", "lsq", "quest", "ternary"],
    ending=[("returns", 0), ("returns NaN", 0), ("returns NaN", 3)]
    + [(ending, at) for ending in ("raises", "is interrupted") for at in range(5)],
    evaluate=WAYS,
)
def test_all_that_was_borrowed_comes_back(preset, ending, evaluate, monkeypatch):
    model = quantized_net(preset)
    estimator, loss_of, loss = started(model, num_samples=3, evaluate=evaluate)
    in_chunks_of(2, monkeypatch, estimator.weights)
    closure = Vandal(model, loss_of, *ending)
    before = Snapshot(model)
    steps = [w.step_size().clone() for w in estimator.weights]
    if ending[0] in ("raises", "is interrupted"):
        with pytest.raises(OSError if ending[0] == "raises" else KeyboardInterrupt):
            estimator.refine_grads_(closure, expected_loss=loss)
        before.assert_same()
        assert estimator.step == 0
        assert closure.calls == ending[1] + 1
    elif ending[0] == "returns NaN":
        with pytest.warns(RuntimeWarning, match="not finite"):
            stats = estimator.refine_grads_(closure, expected_loss=loss)
        before.assert_same()
        assert stats.fallback
    else:
        stats = estimator.refine_grads_(closure, expected_loss=loss)
        before.assert_same(REWRITTEN)
        assert stats.fallback is None
        assert closure.calls == CALLS[evaluate]
    for w, step in zip(estimator.weights, steps, strict=True):
        assert torch.equal(w.step_size(), step)


@EVERY_WAY
def test_a_hand_written_quantizers_model_is_protected_if_it_is_named(evaluate):
    x, y = batch()
    model = Net()
    triples = [("first", model.first.weight, 0.5), ("second", model.second.weight, 0.5)]
    backward(lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    estimator = fogzo.FogzoEstimator(triples, model=model, noise_share=0.1, evaluate=evaluate)
    estimator.refine_grads_(Vandal(model, lambda: mse_loss(model(x), y)))
    before.assert_same(REWRITTEN)


@EVERY_WAY
@pytest.mark.parametrize("cls", [fogzo.SpsaEstimator, fogzo.ControlVariateEstimator])
def test_the_other_estimators_give_everything_back_too(cls, evaluate):
    x, y = batch()
    model = quantized_net("quest")
    weights = fogzo.quantized_weights(model)
    backward(lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    estimator = cls(weights, num_samples=2, evaluate=evaluate)
    estimator.refine_grads_(Vandal(model, lambda: mse_loss(model(x), y)))
    before.assert_same(REWRITTEN)


@EVERY_WAY
def test_counting_flips_changes_nothing(evaluate):
    model = quantized_net("quest")
    estimator, _, _ = started(model, evaluate=evaluate)
    before = Snapshot(model)
    assert 0 < estimator.flip_rate() < 1
    before.assert_same()
    assert estimator.step == 0


@IN_16_BITS
@EVERY_WAY
def test_weights_come_back_exactly_after_many_steps_without_an_optimizer(evaluate):
    # +eps v, -2 eps v, +eps v would have drifted by now.
    model = quantized_net(dropout=0.0).to(torch.bfloat16)
    x, y = batch(dtype=torch.bfloat16)
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, noise_share=0.1, evaluate=evaluate)
    before = [w.param.detach().clone() for w in weights]
    for _ in range(20):
        model.zero_grad()
        backward(lambda: mse_loss(model(x), y))
        estimator.refine_grads_(lambda: mse_loss(model(x).float(), y.float()))
    for w, b in zip(weights, before, strict=True):
        assert_bits_equal(w.param, b)


@IN_16_BITS
@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_come_back_exactly_after_the_model_was_cast_between_steps(dtype, evaluate):
    model = quantized_net(dropout=0.0)
    estimator = fogzo.FogzoEstimator(
        fogzo.quantized_weights(model), noise_share=0.3, evaluate=evaluate
    )
    for cast in (torch.float32, dtype):
        model.to(cast)
        model.zero_grad()
        x, y = batch(dtype=cast)
        if cast == torch.float64:
            with torch.no_grad():
                model.first.weight.add_(1e-12)  # what float32 cannot hold
        backward(lambda x=x, y=y: mse_loss(model(x), y))
        before = Snapshot(model)
        estimator.refine_grads_(lambda x=x, y=y: mse_loss(model(x).float(), y.float()))
        before.assert_same(REWRITTEN)


@pairwise(preset=["quest", "ternary"], raises=[False, True], evaluate=WAYS)
def test_measured_step_sizes_stand_still_while_the_weights_move(preset, raises, evaluate):
    model = quantized_net(preset, dropout=0.0)
    estimator, loss_of, _ = started(model, evaluate=evaluate)
    weights = estimator.weights
    steps = [w.step_size().clone() for w in weights]
    latent = [w.param.detach().clone() for w in weights]
    calls = []

    def closure():
        calls.append(0)
        moved = [not torch.equal(w.param, p) for w, p in zip(weights, latent, strict=True)]
        assert all(moved) if evaluate == "in_place" else not any(moved)
        for w, step in zip(weights, steps, strict=True):
            assert torch.equal(w.step_size(), step)
        if raises and len(calls) == 2:
            raise OSError
        return loss_of()

    if raises:
        with pytest.raises(OSError):
            estimator.refine_grads_(closure)
    else:
        estimator.refine_grads_(closure)
    with torch.no_grad():
        for w, step in zip(weights, steps, strict=True):
            w.param.mul_(2)
            torch.testing.assert_close(w.step_size(), 2 * step)


@EVERY_WAY
@pytest.mark.parametrize("raises", [False, True])
def test_a_hand_written_context_that_holds_step_sizes_is_entered_and_left(raises, evaluate):
    events = []

    @contextmanager
    def held():
        events.append("in")
        try:
            yield
        finally:
            events.append("out")

    model = nn.Linear(4, 2)
    record = fogzo.QuantizedWeight(
        "w", model.weight, lambda: torch.tensor(0.5), hold_step_size=held
    )
    estimator = fogzo.FogzoEstimator([record], noise_share=0.1, model=model, evaluate=evaluate)
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


@EVERY_WAY
def test_a_weight_that_took_no_part_is_left_alone(evaluate):
    model = quantized_net(dropout=0.0)
    estimator, loss_of, _ = started(model, evaluate=evaluate)
    model.second.weight.grad = None  # an expert that no token chose
    unused = model.second.weight.detach().clone()
    given = model.first.weight.grad.clone()

    def closure():
        assert_bits_equal(model.second.weight, unused)
        return loss_of()

    stats = estimator.refine_grads_(closure)
    assert stats.fallback is None
    assert model.second.weight.grad is None
    assert not torch.equal(model.first.weight.grad, given)


@EVERY_WAY
def test_batch_statistics_outside_the_quantized_part_are_protected_if_the_model_is_named(evaluate):
    class Whole(Net):
        def __init__(self):
            super().__init__()
            self.backbone = quantized_net()

        def forward(self, x):
            return self.head(self.norm(self.backbone.second(self.backbone.first(x))))

    x, y = batch()
    model = Whole()
    weights = fogzo.quantized_weights(model.backbone)
    backward(lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    estimator = fogzo.FogzoEstimator(weights, model=model, evaluate=evaluate)
    estimator.refine_grads_(lambda: mse_loss(model(x), y))
    before.assert_same({"backbone.first.weight", "backbone.second.weight"})
    assert model.norm.num_batches_tracked == 1


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


def train(evaluate=None, steps=3):
    model = noisy_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    estimator = fogzo.FogzoEstimator(
        fogzo.quantized_weights(model),
        num_samples=2,
        noise_share=0.3,
        evaluate=evaluate or "in_place",
    )
    losses = []
    for step in range(steps):
        x, y = batch(seed=step)
        with estimator.record_rng():
            loss = backward(lambda x=x, y=y: mse_loss(model(x), y))
        if evaluate is not None:
            estimator.refine_grads_(lambda x=x, y=y: mse_loss(model(x), y), expected_loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    buffers = [b.clone() for b in model.buffers()]
    return losses, buffers, [torch.rand(4).tolist(), random.random(), np.random.rand(4).tolist()]


@EVERY_WAY
def test_a_run_with_fogzo_meets_the_random_numbers_and_batch_statistics_of_one_without(evaluate):
    with streams_put_back(seed=3):
        without = train()
    with streams_put_back(seed=3):
        with_it = train(evaluate)
    assert without[0] == with_it[0]
    assert without[2] == with_it[2]
    for a, b in zip(without[1], with_it[1], strict=True):
        assert_bits_equal(a, b)


@EVERY_WAY
def test_recorded_streams_make_the_probe_at_the_unperturbed_weights_equal_backwards(evaluate):
    model = noisy_net()
    estimator, loss_of, loss = started(model, evaluate=evaluate)
    seen = []

    def closure():
        seen.append(loss_of())
        return seen[-1]

    estimator.refine_grads_(closure, expected_loss=loss)
    assert seen[0].item() == loss.item()
    assert len(seen) == 3


def test_without_recording_other_dropout_masks_are_caught_and_the_remedy_is_named():
    model = quantized_net(dropout=0.5, norm=nn.LayerNorm)
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    loss = backward(lambda: mse_loss(model(x), y))
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"with estimator.record_rng\(\): loss"):
        estimator.refine_grads_(lambda: mse_loss(model(x), y), expected_loss=loss)
    before.assert_same()


@EVERY_WAY
def test_a_recording_serves_one_step_only(evaluate):
    model = quantized_net(dropout=0.5, norm=nn.LayerNorm)
    recorded = torch.get_rng_state()
    estimator, loss_of, _ = started(model, evaluate=evaluate)
    states = []

    def closure():
        states.append(torch.get_rng_state())
        return loss_of()

    estimator.refine_grads_(closure)
    backward(loss_of)
    estimator.refine_grads_(closure)
    assert all(torch.equal(s, recorded) for s in states[:2])
    assert all(torch.equal(s, torch.get_rng_state()) for s in states[2:])
    assert len(states) == 4


@EVERY_WAY
def test_all_probes_of_a_step_see_the_same_random_numbers_without_any_recording(evaluate):
    model = quantized_net()
    x, y = batch()
    backward(lambda: mse_loss(model(x), y))
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, num_samples=2, noise_share=0.3, evaluate=evaluate)
    draws = []

    def closure():
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return mse_loss(model(x), y)

    for _ in range(3):
        draws.clear()
        estimator.refine_grads_(closure)
        assert len(draws) == (2 if evaluate == "stacked" else 4)
        assert len(set(draws)) == 1
        backward(lambda: mse_loss(model(x), y))


@EVERY_WAY
def test_a_closure_that_begins_to_draw_from_numpy_late_is_replayed_too(evaluate):
    # Masking in the input that starts after a warm-up, or with a probability.
    model = quantized_net(dropout=0.0)
    estimator, loss_of, _ = started(model, num_samples=2, evaluate=evaluate)
    for _ in range(2):
        estimator.refine_grads_(loss_of)
        backward(loss_of)
    draws = []

    def closure():
        draws.append(np.random.rand())
        return loss_of()

    before = Snapshot(model)
    estimator.refine_grads_(closure)
    before.assert_same(REWRITTEN)
    assert len(set(draws)) == 1


# Modes, gradient mode, and what else a closure may leave behind


@EVERY_WAY
def test_probes_run_in_train_mode_without_gradient(evaluate):
    model = quantized_net()
    estimator, loss_of, _ = started(model, evaluate=evaluate)
    calls = []

    def closure():
        calls.append(0)
        assert model.training
        assert model.norm.training
        assert not torch.is_grad_enabled()
        return loss_of()

    estimator.refine_grads_(closure)
    assert calls


@pairwise(enabled=[True, False], ending=["returns", "raises"], evaluate=WAYS)
def test_a_closure_cannot_leak_the_gradient_mode(enabled, ending, evaluate):
    model = quantized_net()
    estimator, loss_of, _ = started(model, num_samples=2, evaluate=evaluate)

    def closure():
        torch.set_grad_enabled(True)
        if ending == "raises":
            raise OSError
        return loss_of()

    try:
        with torch.set_grad_enabled(enabled):
            before = Snapshot(model)
            if ending == "raises":
                with pytest.raises(OSError):
                    estimator.refine_grads_(closure)
                before.assert_same()
            else:
                estimator.refine_grads_(closure)
                before.assert_same(REWRITTEN)
    finally:
        torch.set_grad_enabled(True)


@EVERY_WAY
def test_a_closure_may_run_in_inference_mode(evaluate):
    model = quantized_net()
    estimator, loss_of, _ = started(model, evaluate=evaluate)
    before = Snapshot(model)
    estimator.refine_grads_(torch.inference_mode()(loss_of))
    before.assert_same(REWRITTEN)


@EVERY_WAY
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("ending", ["returns", "calls backward"])
def test_a_closure_that_clears_the_gradients_cannot_lose_them(ending, to_none, evaluate):
    # torch.optim's own closures begin with zero_grad() and end with backward().
    model = quantized_net()
    estimator, loss_of, _ = started(model, evaluate=evaluate)
    before = Snapshot(model)

    def closure():
        model.zero_grad(set_to_none=to_none)
        loss = loss_of()
        if ending == "calls backward":
            loss.backward()
        return loss

    if ending == "calls backward":
        with pytest.raises(ValueError, match=r"calls backward|backward\(\) called"):
            estimator.refine_grads_(closure)
        before.assert_same()
    else:
        estimator.refine_grads_(closure)
        before.assert_same(REWRITTEN)


@pytest.mark.parametrize("evaluate", ["in_place", "lean"])
def test_a_closure_that_adds_to_gradients_adds_to_its_own(evaluate):
    model = quantized_net()
    estimator, loss_of, loss = started(model, evaluate=evaluate)
    before = Snapshot(model)

    def closure():
        with torch.enable_grad():
            again = loss_of()
            again.backward()
        return again

    estimator.refine_grads_(closure, expected_loss=loss)
    before.assert_same(REWRITTEN)


# What a closure should leave alone


class Momentum(nn.Module):
    """A network and its moving average, which every forward pass moves, in one of two ways."""

    def __init__(self, assigns):
        super().__init__()
        self.own, self.average = quantized_net(), Net().requires_grad_(False)
        self.assigns = assigns

    def forward(self, x):
        with torch.no_grad():
            for mean, param in zip(
                self.average.head.parameters(), self.own.head.parameters(), strict=True
            ):
                if self.assigns:
                    mean.data = mean.data * 0.9 + param.data * 0.1
                else:
                    mean.lerp_(param + 1, 0.1)
            return self.own(x) - self.average(x)


@EVERY_WAY
@pytest.mark.parametrize("assigns", [True, False])
def test_parameters_that_are_not_quantized_come_back_or_the_closure_is_refused(assigns, evaluate):
    model, (x, y) = Momentum(assigns), batch()
    mse_loss(model.own(x), y).backward()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, noise_share=0.3, evaluate=evaluate)
    before = Snapshot(model)
    if assigns:
        estimator.refine_grads_(lambda: mse_loss(model(x), y))
        before.assert_same({f"own.{name}" for name in REWRITTEN})
        return
    with pytest.raises(
        ValueError, match=r"'weight' of a Linear, of shape \(3, 8\), in place.*regis"
    ):
        estimator.refine_grads_(lambda: mse_loss(model(x), y))
    for name in ("average.head.weight", "average.head.bias"):
        before.values[name] = model.get_parameter(name).clone()
    before.assert_same()


class Counting(nn.Module):
    """A network that counts its forward passes in a buffer, in one of three ways."""

    def __init__(self, how):
        super().__init__()
        self.own, self.how, self.seen = quantized_net(dropout=0.0), how, []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.how == "assigns":
            self.calls = self.calls + 1
        elif self.how == "writes":
            self.calls += 1
        else:
            self.calls.data += 1  # which counts no version
        self.seen.append(self.calls.item())
        return self.own(x) * (2 - torch.exp(-self.calls / 20))


@pytest.mark.parametrize("evaluate", ["in_place", "lean"])
@pytest.mark.parametrize("how", ["assigns", "writes", "writes to .data"])
def test_every_probe_begins_with_the_buffers_that_backward_left(how, evaluate):
    model, (x, y) = Counting(how), batch()
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, noise_share=0.3, num_samples=2, evaluate=evaluate)
    estimator.record(lambda x, y: mse_loss(model(x), y), x, y).backward()
    estimator.refine_grads_()
    # The audit alone looks what one more forward pass makes of them.
    assert sorted(set(model.seen)) == [1, 2, 3] and model.seen.count(3) == 1
    assert len(model.seen) >= 7 and model.calls == 1


@EVERY_WAY
def test_an_embedding_that_shortens_its_rows_is_no_closure_that_changes_parameters(evaluate):
    embedding, own = nn.Embedding(12, 8, max_norm=0.5), quantized_net(dropout=0.0)
    model, tokens, y = nn.Sequential(embedding, own), torch.arange(12), draw(12, 3)
    with torch.no_grad():
        embedding.weight.copy_(draw(12, 8))
    weights = fogzo.quantized_weights(model)
    estimator = fogzo.FogzoEstimator(weights, noise_share=0.3, evaluate=evaluate)
    loss = estimator.record(lambda t, y: mse_loss(model(t), y), tokens, y)
    loss.backward()
    before = Snapshot(model)
    estimator.refine_grads_()
    before.assert_same({f"1.{name}" for name in REWRITTEN})


@EVERY_WAY
def test_a_buffer_that_nothing_can_write_to_is_no_obstacle(evaluate):
    model = quantized_net()
    model.before.register_buffer("positions", torch.arange(8.0).expand(3, 8))
    estimator, loss_of, loss = started(model, evaluate=evaluate)
    before = Snapshot(model)
    estimator.refine_grads_(loss_of, expected_loss=loss)
    before.assert_same(REWRITTEN)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("inference", [False, True])  # as of a cache that an evaluation has filled
def test_buffers_of_any_kind_are_no_obstacle(layout, inference):
    model = quantized_net(dropout=0.0)
    with torch.inference_mode(inference):
        graph = torch.eye(3) if layout is torch.strided else torch.eye(3).to_sparse(layout=layout)
    model.before.register_buffer("graph", graph)
    estimator, loss_of, loss = started(model)
    with torch.inference_mode(inference):  # or torch could not read it
        values = [buffer.to_dense().clone() for buffer in model.buffers()]
    with pytest.raises(ValueError, match="but expected_loss is"):
        estimator.refine_grads_(loss_of, expected_loss=2 * loss)
    assert estimator.refine_grads_(loss_of, expected_loss=loss).probe_losses
    with torch.inference_mode(inference):
        assert all(map(torch.equal, values, (buffer.to_dense() for buffer in model.buffers())))


# Mixed precision


@EVERY_WAY
def test_one_shared_autocast_block_does_not_hide_the_perturbation(evaluate):
    # Inside it, autocast caches the bfloat16 copy of a raw weight that was made at first use.
    linear = nn.Linear(8, 3)
    x, y = batch()
    triples = [("w", linear.weight, 0.5)]
    estimator = fogzo.FogzoEstimator(triples, noise_share=0.5, model=linear, evaluate=evaluate)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        loss = backward(lambda: mse_loss(linear(x).float(), y))
        stats = estimator.refine_grads_(lambda: mse_loss(linear(x).float(), y), expected_loss=loss)
        after = mse_loss(linear(x).float(), y)
    plus, minus = stats.probe_losses
    assert len({plus, minus, loss.item()}) == 3
    assert after.item() == loss.item()


@EVERY_WAY
def test_an_error_in_a_shared_autocast_block_leaves_no_perturbed_cast_behind(evaluate):
    linear = nn.Linear(8, 3)
    x, y = batch()
    triples = [("w", linear.weight, 0.5)]
    estimator = fogzo.FogzoEstimator(triples, noise_share=0.5, model=linear, evaluate=evaluate)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        loss = backward(lambda: mse_loss(linear(x).float(), y))

        def closure():
            with torch.enable_grad():
                linear(x)
            raise OSError

        with pytest.raises(OSError):
            estimator.refine_grads_(closure)
        assert mse_loss(linear(x).float(), y).item() == loss.item()
