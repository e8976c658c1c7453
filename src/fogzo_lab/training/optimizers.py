"""The optimizer of a run by its name, and the parameters without weight decay."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fogzo import quantized_weights
from fogzo.layers.parameter_groups import decaying
from fogzo.wording import nearest
from fogzo_lab.training import parq
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.models import weights_to_quantize

_UNUSABLE = {
    "lbfgs": "evaluates the loss again within a step, where no estimator can refine the gradient",
    "sparseadam": "needs sparse gradients, which quantized weights do not have",
}


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """The configured optimizer over the trained parameters of a model.

    Weights of layers decay: matrices and kernels, embeddings among them. Norms, biases, learned
    step sizes, class tokens and tables of positions do not. Tied parameters count once. With FSDP,
    call it after the model is sharded.

    The weights of a method that keeps their norm are in a group of their own, without decay, whose
    ``rate_factor`` multiplies the learning rate.

    Args:
        config: ``optimizer`` is the name of any class of torch.optim in any case, of which adamw
            takes betas of (0.9, 0.95) for language models, sgd a momentum of 0.9, and muon the
            matrices of hidden layers while AdamW takes the rest at the same learning rate;
            everything else is torch's default. ``learning_rate`` and ``weight_decay`` go with it.
        model: The quantized model, which has its learned step sizes already.

    Returns:
        One optimizer that works with a scheduler and a gradient scaler.

    Raises:
        ValueError: If the name is unknown, or names an optimizer that cannot do what is asked.
    """
    name = config.optimizer.lower()
    cls = optimizer_class(config.optimizer)
    decays = decaying(model)
    if name == "muon":
        if config.method.name == "parq":
            raise ValueError("parq goes around one optimizer, and muon is two: --optimizer adamw")
        return _muon(config, cls, model, decays)
    if name == "rprop" and config.weight_decay:
        raise ValueError(
            f"rprop has no weight decay, got {config.weight_decay}: --weight-decay 0, or "
            "--optimizer adamw"
        )
    options: dict[str, Any] = {"sgd": {"momentum": 0.9}, "adamw": _betas(config)}.get(name, {})
    build: Callable[..., Optimizer] = cls
    groups = _groups(decays, config, model)
    if config.method.name != "parq":
        return build(groups, lr=config.learning_rate, **options)
    groups = parq.mark_groups(config, groups, weights_to_quantize(config, model))
    return parq.around(config, build(groups, lr=config.learning_rate, **options))


class JointOptimizer(Optimizer):
    """Several optimizers as one, with one list of parameter groups and one state between them.

    A gradient scaler sees all gradients together and skips either every optimizer or none. With
    separate scalers, clipping would carry the NaN of one optimizer into the gradients of others.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__([group for each in optimizers for group in each.param_groups], {})
        self.optimizers = optimizers
        for each in optimizers:
            self.state.update(each.state)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let each work on the groups and state of this optimizer, not on copies."""
        groups = iter(self.param_groups)
        for each in self.optimizers:
            each.param_groups = list(islice(groups, len(each.param_groups)))
            each.state = self.state


def optimizer_class(given: str) -> type[Optimizer]:
    """The class of torch.optim of that name, in any case.

    Raises:
        ValueError: If this torch has none, or it is one that cannot work here.
    """
    classes = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    name = given.lower()
    if name in _UNUSABLE:
        raise ValueError(f"{given} {_UNUSABLE[name]}: --optimizer adamw")
    if name not in classes:
        names = sorted(set(classes) - set(_UNUSABLE))
        raise ValueError(
            f"torch {torch.__version__} has no optimizer {given!r}, only {', '.join(names)}: "
            f"--optimizer {nearest(name, names) or 'adamw'}"
        )
    return classes[name]


def _groups(
    decays: Mapping[nn.Parameter, bool], config: TrainConfig, model: nn.Module
) -> list[dict[str, Any]]:
    constrained: set[nn.Parameter] = set()
    if config.method.name == "cewt":
        constrained = {weight.param for weight in quantized_weights(model)}
    free = {p: decayed for p, decayed in decays.items() if p not in constrained}
    groups: list[dict[str, Any]] = [
        {"params": [p for p, decayed in free.items() if decayed]},
        {"params": [p for p, decayed in free.items() if not decayed]},
        {"params": [p for p in decays if p in constrained]},
    ]
    for group, decay in zip(groups, (config.weight_decay, 0.0, 0.0), strict=True):
        group["weight_decay"] = decay
    if constrained:
        groups[2]["rate_factor"] = config.method.options["rate_factor"]
    return [group for group in groups if group["params"]]


def _betas(config: TrainConfig) -> dict[str, Any]:
    # Language models are trained with a shorter memory of squares, as in LLaMA and nanoGPT.
    return {"betas": (0.9, 0.95)} if config.model.family == "llama" else {}


def _muon(
    config: TrainConfig,
    muon: Callable[..., Optimizer],
    model: nn.Module,
    decays: dict[nn.Parameter, bool],
) -> Optimizer:
    modules = list(model.modules())
    # The last linear layer is the output head of every network of the recipes.
    apart = {module.weight for module in modules if isinstance(module, nn.Embedding)}
    apart |= {module.weight for module in [m for m in modules if isinstance(m, nn.Linear)][-1:]}
    hidden = {
        p: decayed for p, decayed in decays.items() if decayed and p.ndim == 2 and p not in apart
    }
    rest = {p: decayed for p, decayed in decays.items() if p not in hidden}
    if not hidden:
        raise ValueError(
            f"muon is for the weight matrices of hidden layers, and {type(model).__name__} has "
            "none (kernels of convolutions are not matrices): --optimizer adamw"
        )
    lr = config.learning_rate
    # Updates as large as AdamW's, so that one learning rate suits both.
    matrices = muon(_groups(hidden, config, model), lr=lr, adjust_lr_fn="match_rms_adamw")
    if not rest:
        return matrices
    others = torch.optim.AdamW(_groups(rest, config, model), lr=lr, **_betas(config))
    return JointOptimizer([matrices, others])


class OptimizerState(TypedDict):
    """An optimizer in a checkpoint."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


def load_optimizer(optimizer: Optimizer, given: OptimizerState) -> None:
    """Load the state of an optimizer of the same config, which is where its options come from.

    Raises:
        ValueError: If this optimizer cannot have such a state.
    """
    own = optimizer.state_dict()["param_groups"]
    if [group.get("params") for group in given["param_groups"]] != [g["params"] for g in own]:
        raise ValueError("its optimizer has other groups of parameters")
    unknown = given["state"].keys() - {number for group in own for number in group["params"]}
    if unknown:
        raise ValueError(f"its optimizer has a parameter {unknown.pop()}")
    number = 0
    for each in _parts(optimizer):
        for group in each.param_groups:
            for parameter in group["params"]:
                if found := given["state"].get(number):
                    if "quant_bits" in group:
                        found = parq.own_state(number, parameter, found)
                    _check_state(number, parameter, found, _state_of_small(each, group, parameter))
                number += 1
    optimizer.load_state_dict({"state": given["state"], "param_groups": own})


def _parts(optimizer: Optimizer) -> Sequence[Optimizer]:
    """The optimizers of torch that it consists of."""
    if isinstance(optimizer, JointOptimizer):
        return optimizer.optimizers
    return [getattr(optimizer, "base_optimizer", optimizer)]  # of torchao's PARQ


def _state_of_small(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor
) -> dict[str, Any]:
    """The state that an optimizer has after a step of a small parameter of the same kind."""
    small = torch.zeros([2] * parameter.ndim, dtype=parameter.dtype, device=parameter.device)
    small.grad = torch.zeros_like(small)
    twin = copy.copy(optimizer)
    twin.param_groups, twin.state = [{**group, "params": [small]}], defaultdict(dict)
    twin.step()
    return dict(twin.state[small])


def _check_state(
    number: int, parameter: Tensor, found: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Raise unless a parameter's state is of the kind that a small one of its kind has."""
    odd = found.keys() ^ expected.keys()
    for name in found.keys() & expected.keys():
        value, small = found[name], expected[name]
        if not isinstance(value, Tensor) or not isinstance(small, Tensor):
            if type(value) is not type(small):
                odd.add(name)
            continue
        # Moments are as large as the parameter; others are numbers, or factors of moments.
        moment = small.ndim == parameter.ndim and set(small.shape) <= {2}
        same = value.shape == parameter.shape if moment else _divides(value, parameter)
        if (value.dtype, value.ndim) != (small.dtype, small.ndim) or not same:
            odd.add(name)
    if odd:
        raise ValueError(
            f"its optimizer keeps another {', '.join(sorted(map(str, odd)))} of parameter {number}"
        )


def _divides(factor: Tensor, whole: Tensor) -> bool:
    sizes = zip(reversed(factor.shape), reversed(whole.shape), strict=False)
    return all(own in (1, size) for own, size in sizes)
