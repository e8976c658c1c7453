"""Lean probes alone: what is moved, and when."""

import pytest
import torch
from torch.nn.functional import mse_loss

import fogzo
from toolbox import Snapshot, batch, quantized_net, streams_put_back


@pytest.fixture(autouse=True)
def _clean_streams():
    with streams_put_back(seed=0):
        yield


def started(model=None):
    """An estimator after the backward pass of its model, and the closure."""
    model = model or quantized_net("lsq")
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), evaluate="lean")
    mse_loss(model(x), y).backward()
    return model, estimator, lambda: mse_loss(model(x), y)


def test_only_the_layer_at_work_is_moved():
    model, estimator, loss_of = started()
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {module: name for name, module in model.named_modules()}
    moved_at = []

    def look(module, arguments, output):
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, saved[n])]
        moved_at.append((names[module], moved))

    # Before the probes' own hooks, which run last.
    for layer in (model.first, model.second, model.head):
        layer.register_forward_hook(look)
    estimator.refine_grads_(loss_of)
    order = [("first", ["first.weight"]), ("second", ["second.weight"]), ("head", [])]
    assert moved_at == 2 * order


def test_an_exception_in_a_forward_leaves_nothing_behind():
    model, estimator, loss_of = started()

    def fail(module, arguments):
        raise RuntimeError("in the middle")

    hook = model.second.register_forward_pre_hook(fail)
    before = Snapshot(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        estimator.refine_grads_(loss_of)
    before.assert_same()
    hook.remove()
    assert estimator.refine_grads_(loss_of).fallback is None


def test_a_closure_that_runs_no_quantized_layer_is_refused():
    _, estimator, _ = started()
    _, _, other_loss = started()
    with pytest.raises(ValueError, match="moved nothing"):
        estimator.refine_grads_(other_loss)


def test_a_model_of_which_a_part_is_compiled_is_refused():
    model, estimator, loss_of = started()
    model.first = torch.compile(model.first, backend="eager")
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"'first\.weight' is in a compiled part of the model"):
        estimator.refine_grads_(loss_of)
    before.assert_same()
    model.first = model.first._orig_mod
    model.head = torch.compile(model.head, backend="eager")  # in float
    assert estimator.refine_grads_(loss_of).probe_losses


def test_a_layer_that_computes_without_its_hooks_is_refused():
    model = quantized_net("lsq")
    x, y = batch()
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), evaluate="lean")

    def loss_by(call):
        return mse_loss(model.head(call(model.first(x))), y)

    loss_by(model.second).backward()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"'second\.weight' has a gradient, but its layer did not"):
        estimator.refine_grads_(lambda: loss_by(model.second.forward))
    before.assert_same()
    assert estimator.refine_grads_(lambda: loss_by(model.second)).probe_losses
