"""PARQ (arXiv 2503.15748) by torchao's own implementation: an optimizer around another one.

The forward pass runs on parameters that a proximal map has drawn towards their levels, more and
more over the run; the latent weights are in the optimizer's state. No layer is quantized.
"""

from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fogzo.methods.pull import step_of
from fogzo_lab.training.config import TrainConfig

# Of the run, after which weights are on their levels; in a few steps, before the last one, as a
# step draws weights by how many were taken before it.
ANNEAL_END = 0.9
_NOT_BITS = {"ternary": 0, "sign": 1}


def mark_groups(
    config: TrainConfig, groups: list[dict[str, Any]], weights: list[nn.Parameter]
) -> list[dict[str, Any]]:
    """The groups of an optimizer with the weights to be quantized in groups of their own."""
    quantizer = config.quantizer
    bits = _NOT_BITS.get(quantizer.preset, quantizer.bits if quantizer.bits is not None else 2)
    apart = {id(weight) for weight in weights}
    found = []
    for group in groups:
        inside = [p for p in group["params"] if id(p) in apart]
        outside = [p for p in group["params"] if id(p) not in apart]
        found += [{**group, "params": inside, "quant_bits": bits}] if inside else []
        found += [{**group, "params": outside}] if outside else []
    return found


def check_installed() -> None:
    """Raise a `ValueError` unless torchao is installed."""
    if find_spec("torchao") is None:
        raise ValueError("parq is torchao's optimizer, and torchao is missing: pip install torchao")


def around(config: TrainConfig, optimizer: Optimizer) -> Optimizer:
    """The optimizer whose steps end on weights that are drawn to the grid.

    Raises:
        ValueError: If torchao is not installed.
    """
    check_installed()
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import TernaryUnifQuantizer, UnifQuantizer

    end = min(round(ANNEAL_END * config.max_steps), config.max_steps - 1)
    ternary = config.quantizer.preset == "ternary"
    made: Optimizer = QuantOptimizer(
        optimizer,
        TernaryUnifQuantizer() if ternary else UnifQuantizer(),
        ProxPARQ(0, end, steepness=config.method.options["steepness"]),
        quant_per_channel=config.quantizer.granularity == "channel",
    )
    return made


def own_state(number: int, parameter: Tensor, found: dict[str, Any]) -> dict[str, Any]:
    """A quantized parameter's state without what PARQ keeps of it.

    Raises:
        ValueError: If that is not PARQ's.
    """
    rest, latent, levels = dict(found), found.get("latent"), found.get("quants")
    if not (isinstance(latent, Tensor) and latent.shape == parameter.shape):
        raise ValueError(f"its optimizer keeps no latent weight of parameter {number}")
    if not (isinstance(levels, Tensor) and levels.is_floating_point()):
        raise ValueError(f"its optimizer keeps no levels of parameter {number}")
    del rest["latent"], rest["quants"]
    return rest


class Annealing:
    """How far PARQ's optimizer is, which `load_optimizer` leaves to the run.

    Args:
        optimizer: Made by `around`.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def softness(self) -> float:
        """What the proximal map leaves of distances to the midpoint: from 1 to 0."""
        if self.optimizer.num_steps > self.optimizer.prox_map.anneal_end:
            return 0.0  # which the groups are not told
        (slope,) = {group["inv_slope"] for group in self.optimizer.regularized_param_groups()}
        return float(slope)

    def state_dict(self) -> dict[str, int]:
        """Steps taken."""
        return {"step": self.optimizer.num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there.

        Raises:
            ValueError: If it is no such state.
        """
        self.optimizer.num_steps = step_of(state, "acting")
