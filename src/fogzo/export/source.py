"""What is exported: a quantized model, seen as integers, quantizers of inputs and the rest."""

import copy
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeGuard, cast, get_args

import torch
from torch import Tensor, nn

from fogzo.collectives import is_sharded
from fogzo.export.integers import IntegerWeight, integer_weight
from fogzo.layers import QuantizedLayer, dequantize_
from fogzo.layers.experts import ExpertMatrices, layer_name
from fogzo.layers.quantizable import require_module
from fogzo.layers.quantized_input import QuantizedInput
from fogzo.layers.quantized_layer import STEP_NAMES, plain_class
from fogzo.quantizers import Quantizer
from fogzo.quantizers.checks import require_type
from fogzo.quantizers.step_sizes import positive_step_size

ActivationChoice = Literal["keep", "drop"]


@dataclass(frozen=True)
class Options:
    """How to write.

    Attributes:
        round_steps: Round step sizes to what the format holds; codes stay, weights move.
        activations: Whether quantized inputs are kept, or the weights are exported alone.
        allow_wider: Allow a stored type of more bits than the grid needs.
        variant: Of a format that has several: its stored type, or its style.
    """

    round_steps: bool = False
    activations: ActivationChoice = "keep"
    allow_wider: bool = False
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.activations not in get_args(ActivationChoice):
            raise ValueError(
                f"activations must be 'keep' or 'drop', got {self.activations!r}: "
                "fogzo.export.export(model, folder, activations='drop') exports the weights alone"
            )
        example = "fogzo.export.export(model, folder, round_steps=True)"
        require_type("round_steps", self.round_steps, bool, example)
        require_type("allow_wider", self.allow_wider, bool, example)


@dataclass(frozen=True, eq=False)
class InputForm:
    """How a layer's input is quantized.

    Attributes:
        quantizer: The one in use, with unsigned levels where no input was negative.
        step: Of shape (1, 1), as the forward pass uses it; None where every input is measured,
            or where no input has been measured yet.
        measured: Whether the layer can run: its step is known, or every input is measured.
    """

    quantizer: Quantizer
    step: Tensor | None
    measured: bool


@dataclass(frozen=True, eq=False)
class SourceLayer:
    """A quantized layer.

    Attributes:
        name: In the model, without the prefixes of wrappers.
        module: The layer itself. Its latent weight is not what is exported.
        plain: Its class before `quantize_`.
        weight: The same object for all layers that share a weight.
        input: None where inputs stay in float.
    """

    name: str
    module: QuantizedLayer
    plain: type[nn.Module]
    weight: IntegerWeight
    input: InputForm | None


@dataclass(frozen=True, eq=False)
class Source:
    """A model to export; nothing here changes it.

    Attributes:
        model: Quantized, without wrappers (DDP, what is compiled).
        layers: Its quantized layers, in the order of its modules, but for fused experts.
        experts: The names of the parameters of quantized fused experts, which no format holds.
        options: How to write.
        example: An input, for formats that trace the model; see `answer`.
        tokenizer: A transformers tokenizer to write too, or None.
    """

    model: nn.Module
    layers: dict[str, SourceLayer]
    experts: tuple[str, ...]
    options: Options
    example: Any = None
    tokenizer: Any = None

    @classmethod
    def of(cls, model: nn.Module, options: Options) -> "Source":
        """Look into a model.

        Raises:
            ValueError: If it is no model, nothing in it is quantized, FSDP has sharded it, its
                weights are offloaded, or a grid has no integer form.
        """
        require_module(model, "fogzo.export.export(model, folder)")
        model = _unwrapped(model, {})
        layers: dict[str, SourceLayer] = {}
        weights: dict[int, IntegerWeight] = {}
        experts: list[str] = []
        for name, layer in model.named_modules():
            if not isinstance(layer, QuantizedLayer):
                continue
            if isinstance(layer, ExpertMatrices):
                experts.append(layer_name(name, layer))
                continue
            key = id(layer.weight)
            if key not in weights:
                _check(name, layer)
                weights[key] = integer_weight(layer)
            found = None if options.activations == "drop" else _input_form(layer)
            layers[name] = SourceLayer(name, layer, plain_class(layer), weights[key], found)
        if not (layers or experts):
            raise ValueError(
                "nothing in this model is quantized, so there is nothing to export: train it "
                "after fogzo.quantize_(model, fogzo.lsq(bits=2)), and export it before "
                "fogzo.dequantize_"
            )
        return cls(model, layers, tuple(experts), options)

    @cached_property
    def of_transformers(self) -> bool:
        """Whether a config of transformers says how the model is built."""
        config = getattr(self.model, "config", None)
        if not (hasattr(config, "save_pretrained") and hasattr(self.model, "save_pretrained")):
            return False  # not of a module of one's own that holds the config of a part, say
        try:
            with torch.device("meta"):
                built = type(self.model)(copy.deepcopy(config))
        except TypeError:  # nor of a class that takes more than a config
            return False
        except Exception:  # of one that reads numbers while it is built, which are not there
            return True
        return _shapes(built) == _shapes(self.model)  # nor with a head of one's own

    def with_weights(self, weights: dict[str, IntegerWeight]) -> "Source":
        """The same with other weights."""
        layers = {n: replace(layer, weight=weights[n]) for n, layer in self.layers.items()}
        return replace(self, layers=layers)

    def inputs_alone(self) -> list[str]:
        """Layers whose input is quantized and whose weight is not, by name."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, QuantizedInput) and not isinstance(module, QuantizedLayer)
        ]

    def states_without_tensors(self) -> dict[str, str]:
        """What the model's state holds beside tensors, with its type."""
        state = self.model.state_dict(keep_vars=True)
        return {k: type(value).__name__ for k, value in state.items() if not _is_tensor(value)}

    def unwritten_tensors(self) -> dict[str, str]:
        """Tensors of the model's state that safetensors does not hold, with their kind."""
        state = self.model.state_dict(keep_vars=True).items()
        tensors = {key: value for key, value in state if _is_tensor(value)}
        return {
            key: str(tensor.layout if tensor.layout != torch.strided else tensor.dtype)
            for key, tensor in tensors.items()
            if tensor.layout != torch.strided or tensor.dtype == torch.complex128
        }

    def other_tensors(self) -> dict[str, Tensor]:
        """The state of everything but the quantized layers' weights and step sizes.

        Tensors that are the same under two names are the same object here.
        """
        replaced = {
            f"{name}.{tensor}".lstrip(".")
            for name, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, QuantizedLayer)
            for tensor in _OF_QUANTIZERS
        }
        seen: dict[Hashable, Tensor] = {}
        found: dict[str, Tensor] = {}
        for key, value in self.model.state_dict(keep_vars=True).items():
            if key not in replaced and _is_tensor(value):  # what else there is, `holds` refuses
                tensor = value.detach()
                same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                # Tensors without elements have no address of their own.
                found[key] = seen.setdefault(same if tensor.numel() else key, tensor)
        return found

    def ties(self) -> dict[str, str]:
        """Quantized layers whose weight is that of an earlier one, by name."""
        owners: dict[int, str] = {}
        found = {n: owners.setdefault(id(layer.weight), n) for n, layer in self.layers.items()}
        return {name: owner for name, owner in found.items() if name != owner}

    def names_of(self, name: str) -> list[str]:
        """All names of a layer: more than one where a module is used in several places."""
        module = self.layers[name].module
        named = self.model.named_modules(remove_duplicate=False)
        return [other for other, found in named if found is module]

    def shared(self) -> dict[str, str]:
        """Tensors of a second name, with the first, unless transformers' class shares them."""
        own: dict[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        owners: dict[int, str] = {}
        state = self.model.state_dict(keep_vars=True)
        found = {name: owners.setdefault(id(tensor), name) for name, tensor in state.items()}
        return {
            name: owner
            for name, owner in found.items()
            if name != owner
            and not {name, owner} & own.keys()
            and name.rpartition(".")[2] not in STEP_NAMES
        }

    def baked(self) -> nn.Module:
        """A plain copy, in eval mode, with the weights as they are to be exported."""
        with warnings.catch_warnings():
            # Of layers that never ran. What a forward pass has seen is another question.
            warnings.simplefilter("ignore")
            model = dequantize_(copy.deepcopy(self.model, self._detached()), activations="drop")
        with torch.no_grad():
            for name, module in model.named_modules():
                if name in self.layers:
                    weight = cast(Tensor, module.weight)
                    weight.copy_(self.layers[name].weight.dequantize())
        return model.eval()

    def _detached(self) -> dict[int, Any]:
        """For `copy.deepcopy`: what a forward pass left in the model, which torch does not copy."""
        left = (t for module in self.model.modules() for t in _computed(vars(module)))
        return {id(tensor): tensor.detach().clone() for tensor in left}


def _computed(value: object) -> Iterator[Tensor]:
    """The tensors in a value that remember what they were computed from."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _computed(part)


_OF_QUANTIZERS = ("weight", *STEP_NAMES)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {
        name: tensor.shape
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[2] not in STEP_NAMES and _is_tensor(tensor)
    }


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    """Unlike what a module's `get_extra_state` may return."""
    return isinstance(value, Tensor)


def _unwrapped(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    """A module without the wrappers around it and around parts of it; its layers are the same.

    Args:
        module: Left as it is.
        seen: What this has returned before, by the identity of what it was given.
    """
    if id(module) in seen:
        return seen[id(module)]
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        found = _unwrapped(module.module, seen)
    elif "_orig_mod" in module._modules:  # compiled
        found = _unwrapped(cast(nn.Module, module._orig_mod), seen)
    else:
        own = module._modules
        parts = {n: None if part is None else _unwrapped(part, seen) for n, part in own.items()}
        found = module
        if any(parts[name] is not part for name, part in own.items()):
            found = copy.copy(module)
            found.__dict__["_modules"] = parts
    seen[id(module)] = found
    return found


def _check(name: str, layer: QuantizedLayer) -> None:
    layer._check_own_weight()
    if is_sharded(layer.weight):
        raise ValueError(
            "this model is sharded: load its full state_dict into a model that is not, quantized "
            "alike, and export that one"
        )
    if layer.weight.is_meta:
        raise ValueError(
            f"the weight of {name!r} is on the meta device, offloaded: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings it back"
        )
    layer._check_step_size_shape()


def _input_form(layer: QuantizedLayer) -> InputForm | None:
    quantizer = layer.activation_quantizer
    if quantizer is None or layer.input_step is None:
        return None if quantizer is None else InputForm(quantizer, None, True)
    assert layer.input_state is not None
    if not round(layer.input_state.item()):
        return InputForm(quantizer, None, False)
    step, knee = layer.input_step.detach(), layer.input_step_knee
    if knee is not None:
        step = positive_step_size(step, knee)
    return InputForm(quantizer, quantizer.current_step_size(layer.weight.detach(), step), True)
