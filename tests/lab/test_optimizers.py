"""Which parameters decay, what each name builds, and that two optimizers pass for one."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import fogzo
from fogzo_lab.data import config as data_config
from fogzo_lab.training import config as recipes
from fogzo_lab.training import model_config
from fogzo_lab.training.learning_rates import learning_rate_factor
from fogzo_lab.training.optimizers import JointOptimizer, build_optimizer

CONFIG = recipes.TrainConfig(
    recipe="test",
    model=model_config.MlpConfig(),
    data=data_config.ImagesConfig(),
    learning_rate=0.01,
)
USABLE = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
)


def asked(optimizer, **changes):
    return replace(CONFIG, optimizer=optimizer, **changes)


def mlp(quantizer=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 4))
    return model if quantizer is None else fogzo.quantize_(model, quantizer)


def llama(tied=False):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            tie_word_embeddings=tied,
        )
    )


def vit():
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=3,
        )
    )


def resnet():
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
        )
    )


def names(model, groups):
    of = {parameter: name for name, parameter in model.named_parameters()}
    return [of[parameter] for group in groups for parameter in group["params"]]


def decaying(model, optimizer):
    return set(names(model, [g for g in optimizer.param_groups if g["weight_decay"]]))


def step(model, optimizer, seed=0):
    stream = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 8, generator=stream)
    loss = cross_entropy(model(inputs), inputs[:, :4].argmax(1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(
    ("make", "optimizer", "spared"),
    [
        (llama, "adamw", {"norm"}),
        (llama, "muon", {"norm"}),
        (vit, "sgd", {"bias", "layernorm", "cls_token", "position_embeddings"}),
        (vit, "muon", {"bias", "layernorm", "cls_token", "position_embeddings"}),
        (resnet, "sgd", {"bias", "normalization"}),
    ],
)
def test_of_real_networks_only_matrices_and_kernels_decay(make, optimizer, spared):
    model = fogzo.quantize_(make(), fogzo.lsq(2, granularity="channel"))
    built = build_optimizer(asked(optimizer, weight_decay=0.1), model)
    everything = {name for name, _ in model.named_parameters()}
    assert sorted(names(model, built.param_groups)) == sorted(everything)
    not_decaying = everything - decaying(model, built)
    assert not_decaying
    assert decaying(model, built)
    for name, parameter in model.named_parameters():
        rule = name.endswith("weight_step") or any(word in name for word in spared)
        assert (name in not_decaying) == rule, name
        assert rule or parameter.ndim >= 2


def test_norms_of_two_dimensions_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm((4, 3)), nn.Embedding(5, 3))
    model[0].bias.requires_grad_(False)
    model.register_parameter("input_step", nn.Parameter(torch.ones(4, 1)))
    built = build_optimizer(asked("adamw", weight_decay=0.1), model)
    assert decaying(model, built) == {"0.weight", "2.weight"}
    assert set(names(model, built.param_groups)) == {
        "0.weight",
        "1.weight",
        "1.bias",
        "2.weight",
        "input_step",
    }


def test_a_tied_weight_is_there_once():
    model = llama(tied=True)
    built = build_optimizer(asked("muon", weight_decay=0.1), model)
    together = names(model, built.param_groups)
    assert len(together) == len(set(together)) == len(list(model.parameters()))
    assert "model.embed_tokens.weight" in decaying(model, built)
    assert "model.embed_tokens.weight" not in names(model, built.optimizers[0].param_groups)


@pytest.mark.parametrize("model", [mlp(), mlp(fogzo.lsq(2)), vit()], ids=["mlp", "lsq", "vit"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_grouping_does_not_change_a_bit(name, model):
    """Against the optimizer over all parameters at once."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.Generator()

    def trained(optimizer):
        model.load_state_dict(before)
        for seed in range(4):
            stream.manual_seed(seed)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=stream)
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    plain = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    }[name]()
    expected = trained(plain)
    for ours, theirs in zip(trained(build_optimizer(asked(name), model)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_language_models_have_betas_of_their_own():
    config = asked("AdamW", model=model_config.LlamaConfig(), data=data_config.TextConfig())
    for name in ("adamw", "muon"):
        groups = build_optimizer(replace(config, optimizer=name), llama()).param_groups
        assert {g["betas"] for g in groups if "betas" in g} == {(0.9, 0.95)}
    assert build_optimizer(asked("adamw"), mlp()).defaults["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("quantizer", [fogzo.lsq(2), fogzo.quest(4)], ids=["lsq", "quest"])
def test_every_optimizer_of_torch_trains(name, quantizer):
    for spelled in (name, name.lower()):
        model = mlp(quantizer)
        decay = 0.0 if name == "Rprop" else 0.01
        optimizer = build_optimizer(asked(spelled, weight_decay=decay, learning_rate=3e-3), model)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        losses = torch.tensor([step(model, optimizer) for _ in range(4)])
        assert losses.isfinite().all()
        assert losses[-1] != losses[0]
        for old, new in zip(before, model.parameters(), strict=True):
            assert new.isfinite().all()
            assert not torch.equal(old, new)
        if name in ("AdamW", "Adam", "SGD", "Muon", "NAdam"):
            assert losses[-1] < losses[0]


def test_muon_takes_the_hidden_matrices_alone():
    model = llama()
    matrices, others = build_optimizer(asked("muon"), model).optimizers
    assert isinstance(matrices, torch.optim.Muon)
    assert isinstance(others, torch.optim.AdamW)
    hidden = names(model, matrices.param_groups)
    assert len(hidden) == 7
    assert all("_proj" in name for name in hidden)

    model = vit()
    matrices, others = build_optimizer(asked("muon"), model).optimizers
    rest = names(model, others.param_groups)
    assert "vit.embeddings.patch_embeddings.projection.weight" in rest
    assert "classifier.weight" in rest
    assert all(parameter.ndim == 2 for g in matrices.param_groups for parameter in g["params"])


def test_muon_alone_where_nothing_is_left():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight.requires_grad_(False)
    assert isinstance(build_optimizer(asked("muon"), model), torch.optim.Muon)


def test_muons_updates_are_as_large_as_those_of_adamw():
    """So that one learning rate suits both: about 0.2 a weight, as AdamW's come out in practice."""
    for shape in ((64, 64), (32, 128)):
        model = nn.Sequential(nn.Linear(*shape), nn.Linear(shape[1], 2))
        before = model[0].weight.detach().clone()
        model[0].weight.grad = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(0))
        build_optimizer(asked("muon"), model).step()
        assert 0.15 < (model[0].weight - before).square().mean().sqrt() / 0.01 < 0.25


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_saved_optimizer_goes_on_as_if_nothing_had_happened(name):
    model = mlp(fogzo.lsq(2))
    optimizer = build_optimizer(asked(name, weight_decay=0.1), model)
    for seed in range(3):
        step(model, optimizer, seed)
    copy = mlp(fogzo.lsq(2))
    copy.load_state_dict(model.state_dict())
    resumed = build_optimizer(asked(name, weight_decay=0.1, learning_rate=9.0), copy)
    state = deepcopy(optimizer.state_dict())  # as on disk: counters are tensors, and shared
    assert len(state["state"]) == len(list(model.parameters()))
    resumed.load_state_dict(state)
    for seed in range(3, 6):
        assert step(model, optimizer, seed) == step(copy, resumed, seed)
    for ours, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_reaches_every_optimizer():
    config = asked("muon", max_steps=4, warmup_fraction=0.5)
    optimizer = build_optimizer(config, mlp())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config))
    for each in optimizer.optimizers:
        assert {group["lr"] for group in each.param_groups} == {0.005}
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    scheduler.step()
    for each in optimizer.optimizers:
        assert {group["lr"] for group in each.param_groups} == {0.01}


@pytest.mark.parametrize("overflown", ["0.weight", "3.bias"])
def test_a_gradient_scaler_skips_all_or_none(overflown):
    model = mlp()
    optimizer = build_optimizer(asked("muon"), model)
    assert isinstance(optimizer, JointOptimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def scaled_step(value):
        scaler.scale(model(torch.ones(2, 8)).square().sum()).backward()
        model.get_parameter(overflown).grad.view(-1)[0].fill_(value)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]

    assert all(scaled_step(torch.nan))
    assert scaler.get_scale() == 2.0**15
    assert not any(scaled_step(1.0))


def test_a_closure_is_called_once():
    model = mlp()
    optimizer = build_optimizer(asked("muon"), model)
    calls = []

    def closure():
        calls.append(1)
        loss = model(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert calls == [1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamwe", "--optimizer adamw$"),
        ("Adafactr", "no optimizer 'Adafactr', only .*adafactor.*--optimizer adafactor$"),
        ("optimizer", "no optimizer 'optimizer'"),
        ("???", "--optimizer adamw$"),
        ("LBFGS", "LBFGS evaluates the loss again .*--optimizer adamw"),
        ("sparse_adam", "--optimizer"),
        ("sparseadam", "sparse gradients.*--optimizer adamw"),
    ],
)
def test_names_that_do_not_work_name_one_that_does(name, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(asked(name), mlp())


def test_options_that_would_be_ignored_are_refused():
    with pytest.raises(ValueError, match="--weight-decay 0"):
        build_optimizer(asked("rprop", weight_decay=0.1), mlp())
    for model in (resnet(), nn.Sequential(nn.Linear(4, 2))):
        with pytest.raises(ValueError, match=r"has none .*--optimizer adamw"):
            build_optimizer(asked("muon"), model)
