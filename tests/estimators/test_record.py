"""`record`: the loop's own forward passes are what the probes run again."""

import gc
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import fogzo
from toolbox import EVERY_WAY, Net, Snapshot, assert_bits_equal, batch, quantized_net

# Of batches so small a measured slope is tiny, or large, now and then.
pytestmark = pytest.mark.filterwarnings("ignore:the loss's slope is:RuntimeWarning")

ROWS = (6, 3, 9)


@pytest.fixture(autouse=True)
def _streams():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def start(dropout=0.3, norm=nn.LayerNorm, **options):
    model = quantized_net("lsq", dropout=dropout, norm=norm)
    options = {"noise_share": 0.1, **options}
    return model, fogzo.FogzoEstimator(fogzo.quantized_weights(model), **options)


def micro_batches():
    return [batch(rows, seed=rows) for rows in ROWS]


def loss_of(model, x, y):
    return mse_loss(model(x), y)


def assert_same_grads(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bits_equal(a.grad, b.grad)


# The same as a closure


@EVERY_WAY
@pytest.mark.parametrize("one_sided", [False, True])
def test_a_recorded_window_is_the_closure_over_it(evaluate, one_sided):
    model, estimator = start(evaluate=evaluate, one_sided=one_sided)
    for x, y in micro_batches():
        (estimator.record(loss_of, model, x, y) / 4).backward()
    before = Snapshot(model)
    stats = estimator.refine_grads_()
    before.assert_same(rewritten=["first.weight", "second.weight"])

    torch.manual_seed(0)
    other, by_hand = start(evaluate=evaluate, one_sided=one_sided)

    def window_loss():
        total = torch.zeros(())
        for x, y in micro_batches():
            loss = mse_loss(other(x), y) / 4
            if torch.is_grad_enabled():
                loss.backward()
            total = total + loss.detach()
        return total

    with by_hand.record_rng():
        loss = window_loss()
    assert stats == by_hand.refine_grads_(window_loss, expected_loss=loss)
    assert stats.agreement is not None
    assert_same_grads(model, other)


def test_what_draws_in_between_does_not_disturb_the_replay():
    # One random state per window would not do: the loop draws, and so does the function.
    def noisy(model, x, y):
        x = x * (1 + 0.3 * random.random()) + 0.3 * np.random.rand()
        return mse_loss(model(x), y)

    model, estimator = start()
    states = random.getstate(), np.random.get_state()
    for x, y in micro_batches():
        torch.rand(3), random.random(), np.random.rand()
        (estimator.record(noisy, model, x, y) / 3).backward()
    before = Snapshot(model)
    estimator.refine_grads_()  # compares with what was recorded
    before.assert_same(rewritten=["first.weight", "second.weight"])
    random.setstate(states[0]), np.random.set_state(states[1])


@pytest.mark.parametrize("inside", [False, True])
def test_probes_run_in_the_precision_of_the_forward_pass(inside):
    model, estimator = start()
    seen = []

    def compute_loss(x, y):
        output = model(x)
        seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
        return mse_loss(output.float(), y)

    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        loss = estimator.record(compute_loss, x, y)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        estimator.refine_grads_()
        assert torch.is_autocast_enabled("cpu") is not inside
    assert set(seen) == {(torch.bfloat16 if inside else torch.float32, inside)}


def test_probes_run_in_the_modes_of_the_forward_pass():
    model, estimator = start()
    x, y = batch()
    estimator.record(loss_of, model, x, y).backward()
    model.eval()  # an evaluation in mid-step that has not ended
    before = Snapshot(model)
    estimator.refine_grads_()
    before.assert_same(rewritten=["first.weight", "second.weight"])


# What backward multiplied the loss by


@pytest.mark.parametrize("then", ["nothing", "unscale", "clip", "both"])
def test_a_scaler_and_clipping_are_measured(then):
    model, estimator = start()
    optimizer = torch.optim.SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    for x, y in micro_batches():
        scaler.scale(estimator.record(loss_of, model, x, y) / 3).backward()
    if then in ("unscale", "both"):
        scaler.unscale_(optimizer)
    if then in ("clip", "both"):
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    stats = estimator.refine_grads_()

    torch.manual_seed(0)
    plain, reference = start()
    for x, y in micro_batches():
        (reference.record(loss_of, plain, x, y) / 3).backward()
    factor = model.head.weight.grad.norm() / plain.head.weight.grad.norm()
    expected = reference.refine_grads_()
    assert stats.agreement == pytest.approx(expected.agreement, rel=1e-4)
    torch.testing.assert_close(
        model.first.weight.grad, factor * plain.first.weight.grad, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("what", ["each layer", "values", "decay"])
def test_what_changes_some_gradients_more_than_others_is_told_once(what):
    model, estimator = start()
    with pytest.warns(RuntimeWarning, match="more than one common factor") as told:
        for _ in range(2):
            model.zero_grad()
            estimator.record(loss_of, model, *micro_batches()[2]).backward()
            if what == "each layer":
                for layer in (model.first, model.second):
                    nn.utils.clip_grad_norm_(layer.parameters(), 0.01)
            elif what == "values":
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            else:
                for param in model.parameters():
                    param.grad.add_(param.detach())
            estimator.refine_grads_()
    assert sum("common factor" in str(warning.message) for warning in told) == 1


def test_a_scaler_is_measured_where_most_of_a_gradient_is_zero():
    # A batch uses few rows of an embedding, none of them among those that are looked at.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20_000, 16), nn.Flatten(), nn.Linear(48, 3))
    fogzo.quantize_(model, fogzo.lsq(4), filter_fn=lambda module, name: name == "0")
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model))
    tokens, y = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 2])
    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu")
    loss = estimator.record(lambda x, y: nn.functional.cross_entropy(model(x), y), tokens, y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    stats = estimator.refine_grads_()
    assert stats.probe_losses == pytest.approx([loss.item()] * 2, rel=0.05)


def test_a_stated_scale_gives_the_losses_their_units():
    model, estimator = start(one_sided=True)
    x, y = batch()
    loss = estimator.record(loss_of, model, x, y)
    (1024 * loss).backward()
    assert estimator.refine_grads_(grad_scale=1024).base_loss == loss.item()


def test_a_sum_of_recorded_losses_keeps_their_weights():
    def penalty(model):
        return model.first.quantized_weight().square().mean()

    model, estimator = start(dropout=0.0)
    x, y = batch()
    loss = estimator.record(loss_of, model, x, y)
    loss += 0.1 * estimator.record(penalty, model)  # in place: hooks see what was recorded
    loss.backward()
    recorded = estimator.refine_grads_()
    other, by_hand = start(dropout=0.0)
    loss = loss_of(other, x, y) + 0.1 * penalty(other)
    loss.backward()
    stats = by_hand.refine_grads_(
        lambda: loss_of(other, x, y) + 0.1 * penalty(other), expected_loss=loss
    )
    assert recorded.agreement == pytest.approx(stats.agreement, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_only_what_reaches_the_gradients_counts():
    model, estimator = start(one_sided=True)
    x, y = batch()
    loss = estimator.record(loss_of, model, x, y)
    torch.autograd.grad(loss, [model.head.weight], retain_graph=True)  # writes no .grad
    loss.backward(retain_graph=True)
    (2 * loss).backward(create_graph=True)
    assert estimator.refine_grads_().base_loss == pytest.approx(3 * loss.item())
    for p in model.parameters():
        p.grad = None  # create_graph makes a cycle of them


# What compute_loss may return and take


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: loss,
        lambda loss: (loss, "logits"),
        lambda loss: {"logits": None, "loss": loss},
        lambda loss: SimpleNamespace(loss=loss),
    ],
    ids=["scalar", "tuple", "dict", "object"],
)
def test_the_loss_is_found_in_what_is_returned_which_comes_back_as_it_is(wrap):
    model, estimator = start()
    made = []

    def compute_loss(x, y):
        made.append(wrap(loss_of(model, x, y)))
        return made[-1]

    output = estimator.record(compute_loss, *batch())
    assert output is made[0]
    loss = output if isinstance(output, torch.Tensor) else None
    if loss is None:
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    (output["loss"] if loss is None else loss).backward()
    assert estimator.refine_grads_().agreement is not None


@pytest.mark.parametrize(
    "output",
    [None, 1.0, torch.zeros(2), torch.zeros(1), {"losses": torch.zeros(())}, (), torch.tensor(1)],
    ids=str,
)
def test_what_holds_no_loss_is_refused(output):
    _, estimator = start()
    with pytest.raises(ValueError, match=r"estimator.record\(lambda: losses.mean\(\)\)"):
        estimator.record(lambda: output)


def test_a_function_may_take_things_out_of_its_batch_and_so_may_the_loop():
    model, estimator = start()

    def compute_loss(inputs, *, nested):
        return loss_of(model, inputs.pop("x"), nested[0].pop("y"))

    x, y = batch()
    inputs, nested = {"x": x}, ({"y": y},)
    estimator.record(compute_loss, inputs, nested=nested).backward()
    assert (inputs, nested) == ({}, ({},))  # as if it had been called without record
    assert estimator.refine_grads_().agreement is not None


def test_a_tensor_changed_in_place_is_refused():
    model, estimator = start()
    x, y = batch()
    estimator.record(loss_of, model, x, y).backward()
    y.mul_(2)
    with pytest.raises(ValueError, match=r"shape \(16, 3\), is not what it was.*x.clone\(\)"):
        estimator.refine_grads_()
    with pytest.raises(ValueError, match="compute_loss changes it in place"):
        estimator.record(lambda x: loss_of(model, x.mul_(2), y), x)


def test_a_function_that_reads_the_loops_variables_is_found_out():
    model, estimator = start()
    loader = [batch(seed=1), batch(seed=2)]
    for x, y in loader:
        (estimator.record(lambda: loss_of(model, x, y)) / 2).backward()
    with pytest.raises(ValueError, match=r"argument, estimator.record\(compute_loss, x, y\)"):
        estimator.refine_grads_()


# Which micro-batches make up the window


@pytest.mark.parametrize("how", ["none", "zero", "data"])
@pytest.mark.parametrize("first", ["zero", "record"])
def test_steps_that_are_not_refined_leave_no_trace(how, first):
    model, estimator = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    references = []

    def drop_gradients():
        if how != "data":
            optimizer.zero_grad(set_to_none=how == "none")
        for grad in (p.grad for p in model.parameters() if p.grad is not None):
            grad.data.zero_()  # which counts no version

    for step in range(5):
        for i, (x, y) in enumerate(micro_batches()):
            if first == "zero" and i == 0:
                drop_gradients()
            loss = estimator.record(loss_of, model, x, y)
            if first == "record" and i == 0:
                drop_gradients()
            loss.backward()
            references.append(weakref.ref(x))
            del x, y, loss
        if step == 4:
            estimator.refine_grads_()  # compares with the recorded losses
        optimizer.step()
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_a_loss_that_is_not_differentiated_is_no_part_of_the_window():
    model, estimator = start(one_sided=True)
    losses = []
    for i, (x, y) in enumerate(micro_batches()):
        loss = estimator.record(loss_of, model, x, y)
        losses.append(loss.item())
        if i < 2:
            loss.backward()
    skipped = weakref.ref(x)
    del x, y, loss  # say, because it was not finite
    assert skipped() is None
    assert estimator.refine_grads_().base_loss == pytest.approx(losses[0] + losses[1])


def test_an_exception_between_record_and_refine_is_forgotten_with_the_gradients():
    model, estimator = start()
    x, y = batch()

    class Interrupted(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: 1 / 0)

    loss = estimator.record(
        lambda x, y: mse_loss(model.head(model.second(Interrupted.apply(model.first(x)))), y), x, y
    )
    with pytest.raises(ZeroDivisionError):
        loss.backward()  # some gradients are there by now
    model.zero_grad()
    (4 * estimator.record(loss_of, model, x, y)).backward()
    assert estimator.refine_grads_().fallback is None


def test_a_batch_is_let_go_when_it_is_refined_however_long_its_loss_lives():
    model, estimator = start()
    x, y = batch()
    batch_is = weakref.ref(x)
    loss = estimator.record(loss_of, model, x, y)
    loss.backward()
    del x, y
    estimator.refine_grads_()
    assert batch_is() is None
    assert loss.isfinite()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_loss_that_is_added_to_a_recorded_one_is_no_other_backward_pass():
    model, estimator = start()
    for x, _ in micro_batches():
        # What is computed last is differentiated first.
        recorded = estimator.record(lambda x: model.first(x).square().mean(), x)
        beside = model.second(torch.ones(1, model.second.in_features)).square().mean()
        (recorded + 0 * beside).backward()
    assert estimator.refine_grads_().fallback is None


@pytest.mark.parametrize("when", ["before", "between", "after", "failed", "failed at last"])
def test_gradients_that_hold_something_else_are_refused(when):
    model, estimator = start()
    x, y = batch()

    def other():
        failing = when.startswith("failed")
        loss = (estimator.record if failing else lambda f, *a: f(*a))(loss_of, model, x, y)
        if not failing:
            return loss.backward()
        handle = model.first.weight.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        handle.remove()

    for place in ("before", "between", "after"):
        if place == when or (place, when) in [("between", "failed"), ("after", "failed at last")]:
            other()
        if place != "after":
            estimator.record(loss_of, model, x, y).backward()
    before = Snapshot(model)
    for _ in range(2):  # asking again does not lose anything
        with pytest.raises(ValueError, match="record every loss"):
            estimator.refine_grads_()
    before.assert_same()
    for p in model.parameters():
        p.grad.data.zero_()
    estimator.record(loss_of, model, x, y).backward()
    loss_of(model, x, y).backward()  # what was zeroed is forgotten, and what came later is not
    before = Snapshot(model)
    with pytest.raises(ValueError, match="record every loss"):
        estimator.refine_grads_()
    before.assert_same()
    assert estimator.step == 0


def test_refining_every_micro_batch_is_refused():
    model, estimator = start()
    x, y = batch()
    estimator.record(loss_of, model, x, y).backward()
    estimator.refine_grads_()
    estimator.record(loss_of, model, x, y).backward()
    with pytest.raises(ValueError, match="once per optimizer step"):
        estimator.refine_grads_()


def test_nothing_is_kept_where_nothing_will_be_measured():
    model, estimator = start(noise_share=lambda step: None if step == 0 else 0.1)
    x, y = batch()
    loss = estimator.record(loss_of, model, x, y)
    assert not loss._backward_hooks
    loss.backward()
    assert estimator.refine_grads_().noise_share is None
    with torch.no_grad():
        estimator.record(loss_of, model, x, y)
    with pytest.raises(ValueError, match=r"loss = estimator.record\(compute_loss, x, y\)"):
        estimator.refine_grads_()


def test_a_loss_is_recorded_or_given_as_a_closure():
    model, estimator = start()
    x, y = batch()
    loss = estimator.record(loss_of, model, x, y)
    loss.backward()
    for arguments in [(lambda: loss,), (None, loss)]:
        with pytest.raises(ValueError, match=r"estimator.refine_grads_\(\)"):
            estimator.refine_grads_(*arguments)
    estimator.refine_grads_()


@pytest.mark.parametrize("cls", [fogzo.PlaceboEstimator, fogzo.ControlVariateEstimator])
def test_every_member_of_the_family_records(cls):
    model = fogzo.quantize_(Net(norm=nn.LayerNorm), fogzo.fixed(2))
    estimator = cls(fogzo.quantized_weights(model))
    for x, y in micro_batches():
        estimator.record(loss_of, model, x, y).backward()
    estimator.refine_grads_()
    assert estimator.step == 1
