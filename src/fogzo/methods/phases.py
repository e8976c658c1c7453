"""When to quantize: in float first, quantized for the last share of the steps."""

import torch
from torch import nn

from fogzo.collectives import distributed_like, full, is_sharded
from fogzo.layers import QuantizedLayer
from fogzo.layers.hosts import tell_transformers
from fogzo.layers.quantized_input import FloatPhase
from fogzo.layers.quantized_layer import require_quantized
from fogzo.methods.pull import step_of
from fogzo.methods.ramps import check_count, check_start
from fogzo.quantizers.checks import is_int
from fogzo.quantizers.step_sizes import knee_of


class Switch:
    """Made by `quantize_from`: counts steps, and ends the float phase when it is time.

    Attributes:
        switch_step: After how many steps quantization begins.
        step: How many were taken.
    """

    def __init__(self, model: nn.Module, start: float, total_steps: int) -> None:
        check_start(start)
        check_count("total_steps", total_steps, "quantize_from(model, 0.5, total_steps=10_000)")
        self.switch_step = round(start * int(total_steps))
        self.step = 0
        call = "fogzo.methods.quantize_from(model, 0.5, total_steps=...)"
        self._layers = list(require_quantized(model, call).values())
        _check(self._layers)
        self._phase = FloatPhase(self.switch_step > 0)
        for layer in self._layers:
            layer._float_phase = self._phase
        tell_transformers(model)

    @property
    def is_quantized(self) -> bool:
        """Whether quantization has begun."""
        return not self._phase.active

    def advance_(self) -> None:
        """Count a step. Call it after each optimizer step, to the end of the run."""
        self.step += 1
        if self._phase.active and self.step >= self.switch_step:
            self._phase.active = False
            for layer in (*self._layers, *self._phase.copies):
                _measure_again_(layer)

    def state_dict(self) -> dict[str, int]:
        """How many steps were taken, and after how many quantization begins."""
        return {"step": self.step, "switch_step": self.switch_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue where `state_dict` was taken. The model's own state holds its step sizes.

        Raises:
            ValueError: If it is not a state of a switch, or that run was in float at this step and
                this one would be quantized, or the other way round.
        """
        given = dict(state_dict) if isinstance(state_dict, dict) else {}
        switch_step = given.pop("switch_step", self.switch_step)  # absent from older states
        step = step_of(given if is_int(switch_step) else state_dict, "switch")
        active = step < self.switch_step
        if active != (step < switch_step):
            # Step sizes are measured at the switch, which this run would leave out or do twice.
            raise ValueError(
                f"the saved run was {'quantized' if active else 'in float'} after {step} steps, as "
                f"it switches after {switch_step}, and this one, which switches after "
                f"{self.switch_step}, would be {'in float' if active else 'quantized'}: step sizes "
                "are measured at that moment alone, so keep it, "
                f"quantize_from(model, {switch_step} / total_steps, total_steps=total_steps)"
            )
        self.step, self._phase.active = step, active


def quantize_from(model: nn.Module, start: float, *, total_steps: int) -> Switch:
    """Let a quantized model compute in float until a fraction of the run lies behind.

    ``start=0`` is training that is quantized throughout; ``start=1`` trains in float and quantizes
    after the last step, which is quantization after training. At the switch step sizes are
    measured again, of weights at once and of inputs in the next training forward pass (or by
    `fogzo.calibrate_`). Copies of the model that were made in float and still exist (averages, the
    best so far) are quantized then too, each with step sizes of its own weights.

    The model is quantized from the start, so learned step sizes exist before the optimizer is
    made. In float they have no gradient, so that optimizers leave them alone. Call it after
    `fogzo.quantize_` (and ``fully_shard``), before averages of the model are made:

    >>> import fogzo
    >>> model = fogzo.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), fogzo.lsq(2))
    >>> switch = quantize_from(model, 0.5, total_steps=100)
    >>> switch.switch_step, switch.is_quantized
    (50, False)

    Args:
        model: Quantized by `fogzo.quantize_`.
        start: Fraction of the steps in float.
        total_steps: Optimizer steps of the whole run.

    Returns:
        The switch, whose ``advance_()`` belongs after each optimizer step.

    Raises:
        ValueError: If nothing is quantized, it is in a float phase already, or inputs whose
            step would have to be measured again belong to a sharded model.
    """
    return Switch(model, start, total_steps)


def _check(layers: list[QuantizedLayer]) -> None:
    for layer in layers:
        if layer.is_in_float:
            raise ValueError(
                f"{layer._name!r} is in float already, by an earlier quantize_from: call it once, "
                "and to resume switch.load_state_dict(checkpoint['switch']). A copy, or a model of "
                "torch.load, has no switch of its own: fogzo.quantize_(fresh, quantizer), "
                "fresh.load_state_dict(model.state_dict()), and then quantize_from(fresh, ...)"
            )
        if is_sharded(layer.weight) and layer.measures_input:
            raise ValueError(
                f"the input of {layer._name!r} has a step that is measured once, which a sharded "
                "model cannot do again at the switch: quantize its inputs by a dynamic scale, "
                "activations=fogzo.quest(4) or fogzo.abs_max(8), or not at all"
            )


@torch.no_grad()
def _measure_again_(layer: QuantizedLayer) -> None:
    layer.forget_input_step_size_()
    if not is_sharded(layer.weight):
        layer.measure_step_size_()
    elif layer.weight_step is not None:
        step = layer.quantizer.initial_step_size(full(layer.weight), layer.output_dim)
        assert step is not None
        layer.weight_step.copy_(distributed_like(step, layer.weight_step))
        if layer.weight_step_knee is not None:
            layer.weight_step_knee.copy_(knee_of(step))
