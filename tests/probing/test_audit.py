"""A closure that is not the loss of the backward pass is found out, early or late."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo

pytestmark = pytest.mark.filterwarnings("ignore:(no weight rounds|the probes):RuntimeWarning")


def network(*extra, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), *extra, nn.Linear(64, 64), nn.Tanh())
        return fogzo.quantize_(model.append(nn.Linear(64, 10)), fogzo.lsq(2))


def batches(seed=0, size=512):
    stream = torch.Generator().manual_seed(seed)
    while True:
        yield (
            torch.randn(size, 16, generator=stream),
            torch.randint(10, (size,), generator=stream),
        )


def test_another_batch_is_found_out_at_initialisation_where_all_losses_look_alike():
    refused = 0
    for seed in range(10):
        model, data = network(seed=seed), batches(seed)
        (x, y), (other_x, other_y) = next(data), next(data)
        loss = cross_entropy(model(x), y)
        other = cross_entropy(model(other_x), other_y)
        assert abs(loss - other) < 0.02 * loss
        loss.backward()
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
        before = [p.grad.clone() for p in model.parameters()]
        try:
            estimator.refine_grads_(
                lambda m=model, x=other_x, y=other_y: cross_entropy(m(x), y), expected_loss=loss
            )
        except ValueError as error:
            assert "rebound to the next batch" in str(error)
            refused += 1
            for p, grad in zip(model.parameters(), before, strict=True):
                assert torch.equal(p.grad, grad)
    assert refused == 10


@pytest.mark.parametrize("first_wrong", [3, 12])
def test_a_closure_that_goes_wrong_later_is_found_out_by_the_next_audit(first_wrong):
    model, data = network(), batches()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    found = None
    for step in range(1, 101):
        x, y = next(data)
        seen = next(data) if step >= first_wrong else (x, y)
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        try:
            estimator.refine_grads_(
                lambda s=seen: cross_entropy(model(s[0]), s[1]), expected_loss=loss
            )
        except ValueError:
            found = step
            break
    assert found is not None
    assert found <= (10 if first_wrong <= 10 else 100)


def test_a_closure_far_from_the_loss_is_audited_at_once():
    model, data = network(), batches()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    x, y = next(data)
    for _ in range(2):
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss=loss)
    model.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    with pytest.raises(ValueError, match="a sum against a mean"):  # in step 3, between audits
        estimator.refine_grads_(
            lambda: cross_entropy(model(x), y, reduction="sum"), expected_loss=loss
        )


def test_a_right_closure_is_never_refused_and_audited_seldom():
    model, data = network(), batches(size=64)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        return cross_entropy(model(x), y)

    for _ in range(100):
        x, y = next(data)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        estimator.refine_grads_(closure, expected_loss=loss)
        optimizer.step()
    assert calls == 2 * 100 + 3  # steps 1, 10 and 100


def test_dropout_without_a_recording_is_found_out():
    model, data = network(nn.Dropout(0.1)), batches()
    x, y = next(data)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    loss = cross_entropy(model(x), y)
    loss.backward()
    with pytest.raises(ValueError, match=r"estimator\.record_rng\(\)"):
        estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss=loss)


class Moving(nn.Module):
    """Statistics that every forward pass in train mode moves, and uses."""

    def __init__(self):
        super().__init__()
        self.register_buffer("size", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.size.lerp_(x.detach().abs().mean() * 1.02, 0.01)
        return x / self.size


@pytest.mark.parametrize("kind", ["buffers that move", "bfloat16 inside", "numbers that scatter"])
def test_what_cannot_repeat_a_loss_to_the_last_digit_is_given_room(kind):
    model, data = network(*([Moving()] if kind == "buffers that move" else [])), batches()
    x, y = next(data)
    noise = torch.Generator().manual_seed(0)

    def loss_of():
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16 inside"):
            logits = model(x)
        loss = cross_entropy(logits.float(), y)
        if kind == "numbers that scatter":  # atomics of an accelerator
            return loss * (1 + 1e-4 * torch.randn((), generator=noise))
        # As another graph of a compiler would compute it.
        return loss * (1 + 1e-4 * (not torch.is_grad_enabled()) * (kind == "bfloat16 inside"))

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    for _ in range(3):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        estimator.refine_grads_(loss_of, expected_loss=loss)


@pytest.mark.parametrize(
    "weight",
    [lambda n: 1 + n / 1000, lambda n: 1 / (1 + n / 10), lambda n: 1 + min(0.3, n / 10)],
    ids=["grows", "falls", "grows and stays"],
)
@pytest.mark.parametrize("inside", ["float32", "bfloat16"])
def test_a_loss_that_counts_its_calls_is_no_scatter(weight, inside):
    model, data = network(), batches()
    x, y = next(data)
    calls = 0

    def loss_of():
        nonlocal calls
        with torch.autocast("cpu", torch.bfloat16, enabled=inside == "bfloat16"):
            logits = model(x)
        calls += 1
        return cross_entropy(logits.float(), y) * weight(calls)

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    loss = estimator.record(loss_of)
    loss.backward()
    with pytest.raises(ValueError, match="counts its calls"):
        estimator.refine_grads_()


def test_losses_that_scatter_are_refused_by_no_chance():
    model, data = network(), batches(size=16)
    x, y = next(data)
    noise = torch.Generator().manual_seed(0)

    def loss_of():
        return cross_entropy(model(x), y) * (1 + 1e-4 * torch.randn((), generator=noise))

    refused = 0
    for _ in range(100):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
        try:
            estimator.refine_grads_(loss_of, expected_loss=loss)
        except ValueError:
            refused += 1
    assert refused == 0


@pytest.mark.parametrize("expected", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_an_expected_loss_that_is_no_number_passes_no_audit(expected):
    model, data = network(), batches()
    x, y = next(data)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"expected_loss is (nan|inf)"):
        estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss=expected)
    with pytest.raises(ValueError, match="expected_loss must be"):
        estimator.refine_grads_(lambda: cross_entropy(model(x), y), expected_loss="2.3")


@pytest.mark.parametrize("mistake", ["a sum", "noise of its own"])
def test_an_agreement_that_no_rounding_explains_is_doubted_once(mistake):
    own = torch.Generator().manual_seed(0)  # which nobody replays
    model, data = network(), batches(size=64)
    x, y = next(data)

    def closure():
        if mistake == "a sum":
            return cross_entropy(model(x), y, reduction="sum")
        return cross_entropy(model(x), y) + 0.5 * torch.randn((), generator=own)

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            estimator.refine_grads_(closure)
    (told,) = [str(w.message) for w in caught]
    assert "record_rng" in told
    assert "a sum against a mean" in told


def test_a_loss_with_derivatives_in_it_is_told_to_switch_gradients_on():
    model, data = network(), batches(size=16)
    x, y = next(data)

    def penalised(inputs):
        loss = cross_entropy(model(inputs), y)
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return loss + slope.square().sum()

    def closure():
        with torch.enable_grad():
            return penalised(x.clone().requires_grad_())

    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    loss = penalised(x.clone().requires_grad_())
    loss.backward()
    with pytest.raises(ValueError, match=r"torch\.enable_grad\(\)"):
        estimator.refine_grads_(lambda: penalised(x.clone().requires_grad_()))
    assert estimator.refine_grads_(closure, expected_loss=loss).fallback is None
