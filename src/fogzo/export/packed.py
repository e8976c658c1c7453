"""The packed format: every grid, rotation and quantized input, in a folder of safetensors.

``config.json`` says how each layer is quantized. ``NAME.codes`` in ``model.safetensors`` holds its
levels, numbered from 0, as many to a byte as fit (2 bits for four levels, 1.6 for three);
``NAME.scales`` the distances between levels, of shape (1, 1), (outputs, 1) or (outputs, groups);
``NAME.input_step`` the step of an input that keeps one. The weight is ``(level - zero) * scale``,
rotated where it was. Everything else has its own name; tied tensors are there once.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fogzo.export.folder import (
    folder_path,
    read_config,
    read_tensors,
    write_config,
    write_tensors,
)
from fogzo.export.integers import IntegerWeight
from fogzo.export.packing import digit_table, digits_per_byte, pack_digits
from fogzo.export.read_only import read_only_for_peft
from fogzo.export.source import InputForm, Source
from fogzo.export.verify import ReadBack, answer
from fogzo.layers import QuantizedLayer
from fogzo.layers.fast_path import leave_fast_path
from fogzo.layers.hosts import (
    forget_quantization_,
    models_of_transformers,
    take_own_config,
)
from fogzo.layers.quantizable import require_module
from fogzo.layers.quantized_input import new_of_class, plain_class_of
from fogzo.quantizers import Grid, Hadamard, Quantizer, Scale
from fogzo.quantizers.companding import Bell
from fogzo.quantizers.granularity import from_rows
from fogzo.wording import listed

ModelT = TypeVar("ModelT", bound=nn.Module)

METHOD, VERSION = "fogzo", 1


def write(source: Source, folder: Path) -> None:
    """Write a model."""
    tensors = source.other_tensors()
    modules: dict[str, Any] = {}
    ties = source.ties()
    for name, layer in source.layers.items():
        modules[name] = _describe(layer.weight, layer.input)
        own: dict[str, Tensor] = {}
        if name in ties:
            modules[name]["tied_to"] = ties[name]
        else:
            own["codes"] = pack_digits(layer.weight.unsigned(), layer.weight.num_levels)
            own["scales"] = layer.weight.narrow_step()
        if layer.input is not None and layer.input.step is not None:
            own["input_step"] = layer.input.step
        for alias in source.names_of(name):
            tensors |= {f"{alias}.{kind}".lstrip("."): tensor for kind, tensor in own.items()}
    config: dict[str, Any] = {"quant_method": METHOD, "format_version": VERSION}
    config["ties"] = write_tensors(tensors, folder)
    config["modules"] = modules
    write_config(source.model, folder, config)


def read_back(source: Source, folder: Path) -> ReadBack:
    """What `load_` makes of it."""
    model = load_(source.baked(), folder).eval()
    layers = dict(model.named_modules())
    weights = {name: cast(Tensor, layers[name].weight) for name in source.layers}
    return ReadBack("fogzo.export.load_", weights, lambda example: answer(model, example))


def load_(model: ModelT, folder: str | Path) -> ModelT:
    """Load a packed folder into a plain model of the same architecture, in place.

    The layers keep packed weights in memory and unpack them in every forward pass: the model takes
    the memory of its codes, and answers exactly as it did when it was exported. Casting it
    (``model.bfloat16()``) leaves codes and scales as they are.

    Args:
        model: As it was before ``fogzo.quantize_``, with any weights, or on the meta device if all
            of its tensors are in its state dict.
        folder: Which `export` wrote in the packed format.

    Returns:
        The same model.

    Raises:
        ValueError: If the folder is none, damaged, of another format or another network, or leaves
            tensors on the meta device. The model may then be loaded in part.
    """
    require_module(model, "fogzo.export.load_(model, folder)")
    folder = folder_path(folder, 'fogzo.export.load_(model, "out")')
    config = read_config(folder).get("quantization_config", {})
    if config.get("quant_method") != METHOD:
        raise ValueError(
            f"{folder} is of the method {config.get('quant_method')!r}, expected {METHOD!r}: "
            'fogzo.export.export(model, folder, format="packed") writes one'
        )
    check_version(config, folder)
    tensors = read_tensors(folder)
    tensors |= {alias: tensors[owner] for alias, owner in config["ties"].items()}
    _check_shared(tensors, model, folder)
    pack_layers_(model, config["modules"])
    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if on_meta:
        _fit_to_assign(tensors, model)
    try:
        model.load_state_dict(tensors, assign=on_meta)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise ValueError(
            f"{folder} is of another network ({first:.300}): build the one that was exported"
        ) from None
    tie_layers_(model, config["modules"])
    named = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, tensor in named if tensor.is_meta]
    if left:
        raise ValueError(
            f"no file holds {listed(left)}, on the meta device still, which a model computes as it "
            f"is built: fogzo.export.load_({type(model).__name__}(...), folder), built on the CPU"
        )
    _tell_transformers(model, config)
    return model


def unpack_(model: ModelT) -> ModelT:
    """Make the packed layers of a model plain ones in float, in place, which can be changed.

    Args:
        model: Which `load_` or transformers has loaded from a packed folder.

    Returns:
        The same model. Layers that shared a weight share the parameter.

    Raises:
        ValueError: If nothing is packed, or inputs are quantized, which plain layers would take in
            float. The model is then untouched.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}
    if not packed:
        raise ValueError(
            "nothing in this model is packed: fogzo.export.load_(model, folder) loads packed "
            "layers; those that train become float ones by fogzo.dequantize_(model)"
        )
    with_input = [name for name, layer in packed.items() if layer._input_quantizer is not None]
    if with_input:
        raise ValueError(
            f"the inputs of {listed(with_input)} are quantized, which float layers would not do: "
            "export the trained model without them, "
            'fogzo.export.export(model, folder, "packed", activations="drop")'
        )
    made: dict[Tensor, nn.Parameter] = {}
    for layer in packed.values():
        if layer.codes not in made:
            made[layer.codes] = nn.Parameter(layer.unpacked())
        layer._make_plain(made[layer.codes])
    for own in models_of_transformers(model):
        forget_quantization_(own)
    return model


def _check_shared(tensors: Mapping[str, Tensor], model: nn.Module, folder: Path) -> None:
    """Raise a `ValueError` if one parameter of the model would be loaded from two tensors."""
    owners: dict[int, str] = {}
    for name, own in model.state_dict(keep_vars=True).items():
        first = owners.setdefault(id(own), name)
        if not {first, name} <= tensors.keys() or tensors[first] is tensors[name]:
            continue
        if not torch.equal(tensors[first].to(own.dtype), tensors[name].to(own.dtype)):
            raise ValueError(
                f"{folder} is of another network ({first!r} and {name!r} are two tensors in it, "
                "and one in this model): build the one that was exported"
            )


def _tell_transformers(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Let `save_pretrained` of transformers' models, also of parts, say how they are packed."""
    names = {id(module): name for name, module in model.named_modules()}
    for own in models_of_transformers(model):
        part = _of_part(names[id(own)], model, config)
        if part["modules"]:
            take_own_config(own)
            own.config.quantization_config = part


def _of_part(part: str, model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of a part of the model, which has to be loaded without the rest."""
    if not part:
        return dict(config)
    prefix = f"{part}."
    inside = {
        name.removeprefix(prefix): dict(description)
        for name, description in config["modules"].items()
        if name.startswith(prefix)
    }
    owners: dict[str, str] = {}
    for name, description in inside.items():
        if "tied_to" not in description:
            continue
        owner = description.pop("tied_to")
        first = owners.setdefault(owner, owner if owner.startswith(prefix) else prefix + name)
        if first != prefix + name:
            description["tied_to"] = first.removeprefix(prefix)
        else:  # the file of the part has to hold what is elsewhere in the whole
            kept = model.get_submodule(first)._non_persistent_buffers_set
            kept.difference_update(("codes", "scales"))
    ties = {
        name.removeprefix(prefix): owner.removeprefix(prefix)
        for name, owner in config["ties"].items()
        if name.startswith(prefix) and owner.startswith(prefix)
    }
    return {**config, "modules": inside, "ties": ties}


def _fit_to_assign(tensors: dict[str, Tensor], model: nn.Module) -> None:
    """Make of a file's tensors what may stand in place of a model's, in the dtypes of the model.

    One parameter for all of its names, or each would be assigned one of its own.
    """
    made: dict[int, Tensor] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, own in named:
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if id(tensor) not in made:
            fitting = tensor.to(own.dtype)
            is_param = isinstance(own, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fitting, own.requires_grad) if is_param else fitting
        tensors[name] = made[id(tensor)]


def check_version(config: Mapping[str, Any], folder: Path | str) -> None:
    """Raise a `ValueError` unless this version can read the folder."""
    if config.get("format_version") != VERSION:
        raise ValueError(
            f"{folder} has packed format version {config.get('format_version')!r}, and this fogzo "
            f"reads {VERSION}: pip install --upgrade fogzo, or export the model again"
        )


def pack_layers_(model: nn.Module, modules: dict[str, Any]) -> None:
    """Make the layers that are described take packed weights, which are still to be loaded."""
    for name, description in modules.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the network has no layer {name!r}: build the one that was exported"
            ) from None
        weight = layer._parameters.get("weight")
        if isinstance(layer, PackedLayer | QuantizedLayer) or weight is None:
            raise ValueError(
                f"{name!r} has no float weight to replace: load into the plain model, as it was "
                "before fogzo.quantize_"
            )
        if list(weight.shape) != description["shape"]:
            raise ValueError(
                f"the weight of {name!r} has shape {list(weight.shape)}, and "
                f"{description['shape']} was exported: build the network that was exported"
            )
        del layer._parameters["weight"]
        cls: Any = type(layer)
        layer.__class__ = _packed_class(cls)
        cast(PackedLayer, layer)._prepare(description, weight)
    leave_fast_path(model, PackedLayer)


def tie_layers_(model: nn.Module, modules: dict[str, Any]) -> None:
    """Let layers that share a weight share its codes."""
    for name, description in modules.items():
        if "tied_to" in description:
            layer = cast(PackedLayer, model.get_submodule(name))
            owner = cast(PackedLayer, model.get_submodule(description["tied_to"]))
            layer.codes, layer.scales = owner.codes, owner.scales


class PackedLayer(nn.Module):
    """Mixed into a layer's class by `load_`: ``layer.weight`` is unpacked whenever it is read.

    Attributes:
        codes: Levels from 0, packed into bytes, of shape (outputs, bytes).
        scales: Distances between levels, of shape (1, 1), (outputs, 1) or (outputs, groups).
        input_step: Step size of the input, or None.
    """

    codes: Tensor
    scales: Tensor
    input_step: Tensor | None
    _like: Tensor  # without elements; its dtype is the weight's, whatever casts the model
    _packing: dict[str, Any]
    _input_quantizer: Quantizer | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """See `new_of_class`."""
        return new_of_class(cls, PackedLayer, args, kwargs)

    def _prepare(self, description: dict[str, Any], like: Tensor) -> None:
        self._packing = description
        shape, dim = description["shape"], description["output_dim"]
        outputs, size = shape[dim], torch.Size(shape).numel() // shape[dim]
        device, tied = like.device, "tied_to" in description
        width = -(-size // digits_per_byte(description["levels"]))
        codes = torch.empty(outputs, width, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes, persistent=not tied)
        rows, groups = description["scale_shape"]
        scale_dtype = getattr(torch, description["scale_dtype"])
        scales = torch.empty(rows, groups, dtype=scale_dtype, device=device)
        self.register_buffer("scales", scales, persistent=not tied)
        # In no file, so nothing would bring it from the meta device.
        empty = torch.empty(0, dtype=like.dtype, device="cpu" if like.is_meta else device)
        self.register_buffer("_like", empty, persistent=False)
        form = description["input"]
        self._input_quantizer = None if form is None else _input_quantizer(form)
        step = None
        if form is not None and form["scale"]["kind"] != "dynamic":
            step = torch.empty(1, 1, dtype=getattr(torch, form["step_dtype"]), device=device)
        self.register_buffer("input_step", step)

    def _make_plain(self, weight: nn.Parameter) -> None:
        """Become the layer that was packed."""
        for name in ("codes", "scales", "_like", "input_step"):
            delattr(self, name)
        del self._packing, self._input_quantizer
        cast(nn.Module, self).__class__ = plain_class_of(type(self), PackedLayer)
        cast(nn.Module, self).weight = weight

    @property
    def weight(self) -> Tensor:
        """The weight, of the dtype that the model has been cast to, made anew at each reading."""
        weight = self.unpacked()
        return weight if torch.compiler.is_compiling() else read_only_for_peft(weight, frames=1)

    def unpacked(self) -> Tensor:
        """The weight, as a tensor of its own."""
        packing, scales = self._packing, self.scales
        shape, dim = torch.Size(packing["shape"]), packing["output_dim"]
        size = shape.numel() // shape[dim]
        wide = torch.promote_types(self._like.dtype, torch.float32)
        table = digit_table(packing["levels"], scales.device).to(wide) - packing["zero"]
        rows = embedding(self.codes.int(), table).flatten(1)[:, :size]
        groups = rows.unflatten(1, (scales.shape[1], -1))
        rows = groups.mul_(scales.to(wide).unsqueeze(-1)).flatten(1).to(self._like.dtype)
        if packing["rotation"]:
            # Rows that were cut out of longer ones would be multiplied in another order.
            rows = Hadamard(packing["rotation"])(rows.contiguous())
        return from_rows(rows, shape, dim).contiguous()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, on its input as it was quantized in training."""
        quantizer = self._input_quantizer
        if quantizer is not None and args and args[0].numel():
            feature_dim = 1 - len(self._packing["shape"])
            args = (quantizer.quantize_input(args[0], self.input_step, feature_dim), *args[1:])
        return super().forward(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A cast of the model is one of the weights, not of the scales that they are made from.
        exact = self.scales, self.input_step
        super()._apply(fn, recurse)
        for name, before in zip(("scales", "input_step"), exact, strict=True):
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        """The layer's own, and how it is packed."""
        packing = self._packing
        return ", ".join(
            filter(None, (super().extra_repr(), f"packed, {packing['levels']} levels"))
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_layer, (plain_class_of(type(self), PackedLayer),), self.__getstate__()


@cache
def _packed_class(plain: Any) -> Any:
    return type(f"Packed{plain.__name__}", (PackedLayer, plain), {"__module__": __name__})


def _new_layer(plain: type) -> nn.Module:
    cls = _packed_class(plain)
    return cast(nn.Module, cls.__new__(cls))


def _describe(weight: IntegerWeight, form: InputForm | None) -> dict[str, Any]:
    return {
        "levels": weight.num_levels,
        "zero": weight.zero,
        "scale_shape": list(weight.scale.shape),
        "scale_dtype": _name_of(weight.narrow_step().dtype),
        "rotation": weight.rotation_block,
        "shape": list(weight.shape),
        "output_dim": weight.output_dim,
        "input": None if form is None else _describe_input(form),
    }


def _describe_input(form: InputForm) -> dict[str, Any]:
    quantizer = form.quantizer
    grid, rotation, scale_dtype = quantizer.grid, quantizer.rotation, quantizer.scale_dtype
    return {
        "grid": dataclasses.asdict(grid),
        "scale": dataclasses.asdict(quantizer.scale),
        "granularity": quantizer.granularity,
        "rotation": 0 if rotation is None else rotation.block,
        "companding": None if quantizer.companding is None else "bell",
        "scale_dtype": None if scale_dtype is None else _name_of(scale_dtype),
        "step_dtype": None if form.step is None else _name_of(form.step.dtype),
    }


def _input_quantizer(form: dict[str, Any]) -> Quantizer:
    dtype = form["scale_dtype"]
    return Quantizer(
        Grid(**form["grid"]),
        Scale(**form["scale"]),
        rotation=Hadamard(form["rotation"]) if form["rotation"] else None,
        granularity=form["granularity"],
        scale_dtype=None if dtype is None else getattr(torch, dtype),
        companding=Bell() if form.get("companding") else None,  # older folders do not say
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
