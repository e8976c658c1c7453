"""Which parameters decay: learned step sizes must not, although they have two dimensions."""

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from fogzo.collectives import reshard
from fogzo.layers.experts import fused_parameters
from fogzo.layers.quantizable import require_module
from fogzo.quantizers.checks import is_number


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """A model's trained parameters in groups for an optimizer, with decay of weights alone.

    ``torch.optim.AdamW(fogzo.parameter_groups(model, weight_decay=0.1), lr=1e-3)``. Matrices and
    kernels of layers decay, embeddings among them. Learned step sizes do not, nor norms, biases,
    class tokens and tables of positions. With FSDP, call it after ``fully_shard(model)``.

    >>> import fogzo
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> _ = fogzo.quantize_(model, fogzo.lsq(2))
    >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(model, 0.1)]
    [(2, 0.1), (3, 0.0)]

    Args:
        model: Quantized already, so that it has its learned step sizes.
        weight_decay: Of what decays.

    Returns:
        Groups of parameters with their ``weight_decay``, tied parameters once; none is empty.

    Raises:
        ValueError: If it is no model, or the weight decay no number of 0 or more.
    """
    require_module(model, "fogzo.parameter_groups(model, weight_decay=0.1)")
    if not is_number(weight_decay) or weight_decay < 0:
        raise ValueError(
            f"weight_decay must be a number of 0 or more, got {weight_decay!r}: "
            "fogzo.parameter_groups(model, weight_decay=0.1)"
        )
    decays = decaying(model)
    groups = (
        {"params": [p for p, decayed in decays.items() if decayed], "weight_decay": weight_decay},
        {"params": [p for p, decayed in decays.items() if not decayed], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def decaying(model: nn.Module) -> dict[nn.Parameter, bool]:
    """Every trained parameter once, in the model's order, and whether it should decay."""
    reshard([model])  # else FSDP may expose weights that it has gathered for a forward pass
    decays: dict[nn.Parameter, bool] = {}
    for path, module in model.named_modules():
        norm = "Norm" in type(module).__name__
        experts = {matrices.parameter for matrices in fused_parameters(module)}
        # What a weight is computed from is called original, or original1 and so on.
        computed = isinstance(module, ParametrizationList) and "weight" in path.rpartition(".")[2]
        for name, parameter in module.named_parameters(recurse=False):
            # By name, as step sizes are of shape (groups, 1) and class tokens of (1, 1, width).
            weight = "weight" in name and not name.endswith(("_step", "weight_g"))
            if computed:  # by shape too, as weight_norm has lengths beside, along any dimension
                weight = name == "original" or sum(size > 1 for size in parameter.shape) > 1
            if parameter.requires_grad:
                matrix = (weight and parameter.ndim >= 2 and not norm) or name in experts
                decays.setdefault(parameter, matrix)
    return decays
