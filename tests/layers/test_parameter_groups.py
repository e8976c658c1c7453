"""Which parameters decay."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fogzo
from fogzo.layers.parameter_groups import parameter_groups
from toolbox import Net


def test_learned_steps_do_not_decay_and_nothing_is_lost():
    model = Net(norm=nn.LayerNorm)
    fogzo.quantize_(model, fogzo.lsq(2), activations=fogzo.lsq(2))
    model.head.weight.requires_grad_(False)
    names = {param: name for name, param in model.named_parameters()}
    decayed, plain = (
        {names[param] for param in group["params"]} for group in parameter_groups(model, 0.1)
    )
    assert decayed == {"first.weight", "second.weight"}
    assert "first.weight_step" in plain and "first.input_step" in plain
    assert decayed | plain == set(names.values()) - {"head.weight"}
    # As an optimizer that is given all of them would have it, without gradients.
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1), lr=1.0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before = {name: param.clone() for name, param in model.named_parameters()}
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == decayed


def test_matrices_of_experts_decay_and_their_biases_do_not():
    experts = nn.Module()
    experts.num_experts, experts.is_transposed = 2, False
    experts.up, experts.up_bias = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 3))
    decayed, plain = parameter_groups(experts, 0.1)
    assert decayed["params"][0] is experts.up and plain["params"][0] is experts.up_bias


def test_matrices_from_which_parametrizations_compute_weights_decay():
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 2, 1), nn.LayerNorm(2))
    for module in (model[0], model[2]):
        parametrizations.spectral_norm(module)
    parametrizations.weight_norm(model[1])
    decayed, plain = parameter_groups(model, 0.1)
    own = model[0].parametrizations.weight.original, model[1].parametrizations.weight.original1
    assert set(decayed["params"]) == set(own)
    assert model[1].parametrizations.weight.original0 in set(plain["params"])  # lengths
    assert set(decayed["params"]) | set(plain["params"]) == set(model.parameters())


@pytest.mark.parametrize("dim", [0, 1, 2, None])  # 2 is that of wav2vec 2.0
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_lengths_of_weight_norm_do_not_decay(dim):
    for weight_norm in (parametrizations.weight_norm, nn.utils.weight_norm):
        model = nn.Sequential(weight_norm(nn.Conv1d(4, 3, 5), dim=dim))
        decayed, plain = parameter_groups(model, 0.1)
        assert [tuple(param.shape) for param in decayed["params"]] == [(3, 4, 5)]
        assert len(plain["params"]) == 2  # lengths and the bias


def test_a_matrix_of_one_column_decays_behind_a_parametrization_too():
    model = nn.Sequential(nn.Linear(1, 8), parametrizations.spectral_norm(nn.Linear(1, 8)))
    decayed, _ = parameter_groups(model, 0.1)
    assert len(decayed["params"]) == 2


@pytest.mark.parametrize("given", [-0.1, "0.1", None, True])
def test_a_wrong_decay_is_named(given):
    with pytest.raises(ValueError, match=r"weight_decay must be .* got .*weight_decay=0\.1\)"):
        parameter_groups(nn.Linear(2, 2), given)
