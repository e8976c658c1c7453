"""The ONNX file: torch's own graph, with the quantized weights as integers.

Linear layers become the MatMulNBits of onnxruntime and OpenVINO, whose zero points may lie between
two integers; everything else, or with the variant ``"qdq"`` all of it, the DequantizeLinear of the
standard. Quantized inputs become QuantizeLinear and DequantizeLinear where they are integers with a
step of their own, and plain arithmetic otherwise.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fogzo.export import holds
from fogzo.export.integers import IntegerWeight
from fogzo.export.packing import pack_digits, unpack_digits
from fogzo.export.source import InputForm, Source
from fogzo.export.verify import ReadBack, answer, place_of_answer, trained_answer
from fogzo.quantizers.granularity import from_rows

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "model.onnx"
_OPSET = 21  # the first with integers of 4 bits and with groups
_BLOCKS = (16, 32, 64, 128, 256)


def write(source: Source, folder: Path) -> None:
    """Write model.onnx, and its tensors beside it where they exceed what one file may hold.

    Raises:
        ValueError: If there is no example to trace the model with.
    """
    import onnx_ir as ir

    if source.example is None:
        raise ValueError(
            f"onnx traces the model, and nothing says what a {type(source.model).__name__} takes: "
            'fogzo.export.export(model, folder, "onnx", example=x)'
        )
    program = _traced(source)
    model = program.model
    for node in model.graph:
        node.metadata_props.clear()  # stack traces of torch, a quarter of a small file
    ties = source.ties()
    for name in source.layers:
        if name not in ties:
            _replace(model.graph, source, name)
    if any(node.domain == "com.microsoft" for node in model.graph):
        model.opset_imports["com.microsoft"] = 1
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = None if size < 2**30 else f"{FILE}.data"  # a protobuf ends at 2 GiB
    ir.save(model, folder / FILE, external_data=beside)


def read_back(source: Source, folder: Path) -> ReadBack:
    """What onnxruntime makes of it at full accuracy, and the weights that its operators define."""
    import onnx_ir as ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(
        str(folder / FILE), options, providers=["CPUExecutionProvider"]
    )
    graph = ir.load(folder / FILE).graph
    weights = {name: _decoded(graph, source, name) for name in source.layers}

    def call(example: Any) -> Tensor:
        values = _arguments(source, example)
        fed = {
            declared.name: value.detach().cpu().numpy()
            for declared, value in zip(session.get_inputs(), values, strict=True)
        }
        place = place_of_answer(source.model, example)
        return torch.from_numpy(session.run(None, fed)[place])

    return ReadBack(f"onnxruntime {onnxruntime.__version__}", weights, call)


def _traced(source: Source) -> Any:
    model: Any = source.baked().cpu()
    layers = dict(model.named_modules())
    for name, layer in source.layers.items():
        if layer.input is not None:
            layers[name].register_forward_pre_hook(_input_hook(layer.input, layers[name]))
    if hasattr(model, "config"):
        model.config.use_cache = False
    example = _of_two(model, _tuple_or_dict(source.example))
    args, named = ((), example) if isinstance(example, Mapping) else (example, {})
    shapes = _each(_dynamic, args), _each(_dynamic, named)
    float32 = torch.autocast("cpu", enabled=False)  # or the graph casts as the caller's block does
    with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad(), float32:
        warnings.simplefilter("ignore")  # of torch's own exporter
        try:
            return torch.onnx.export(
                model,
                args,
                kwargs=dict(named),
                dynamo=True,
                # It would rename weights, and fold a batch norm into those of a convolution.
                optimize=False,
                verbose=False,
                opset_version=_OPSET,
                dynamic_shapes=shapes[1] or shapes[0],
            )
        except torch.onnx.OnnxExporterError as error:
            why = " ".join(str(error.__cause__ or error).split())
            raise ValueError(
                f"torch.onnx cannot trace the model with this example ({why:.300}): make its "
                'forward one that torch.export.export(model, (x,)) takes, or format="packed"'
            ) from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a package's warnings out of the log, such as that torchvision is not installed."""
    found = logging.getLogger(name)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)


def _tuple_or_dict(example: Any) -> Any:
    """The example as arguments by position or name, on the CPU and with no history."""
    if not isinstance(example, Mapping | tuple | list):
        example = (example,)
    return _each(
        lambda value: value.detach().cpu() if isinstance(value, Tensor) else value, example
    )


def _of_two(model: nn.Module, example: Any) -> Any:
    """The example, of two inputs if it is of one: torch takes a dimension of one for a constant.

    A first dimension of one need not be that of the batch, as of a GRU's state or of one image.
    """
    one = trained_answer(model, example)
    twice = _each(_twice, example)
    try:
        two = answer(model, twice)
    except Exception:  # whatever a model says of what it does not take
        return example
    return twice if one.shape[:1] == (1,) and two.shape == (2, *one.shape[1:]) else example


def _twice(value: Any) -> Any:
    of_one = isinstance(value, Tensor) and value.shape[:1] == (1,)
    return torch.cat([value, value]) if of_one else value


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Arguments with each replaced, in plain tuples and dicts, which torch.export knows."""
    if isinstance(value, Mapping):
        return {name: _each(function, part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_each(function, part) for part in value)
    return function(value)


def _dynamic(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    # Of token ids also the length.
    dims = range(min(value.dim(), 1 if value.is_floating_point() else 2))
    return dict.fromkeys(dims, torch.export.Dim.AUTO)


def _input_hook(form: InputForm, layer: nn.Module) -> Any:
    """Quantizes a layer's first input as in training."""
    quantizer, grid = form.quantizer, form.quantizer.grid
    feature_dim = 1 - cast(Tensor, layer.weight).dim()
    low, high = (-128, 127) if grid.low_code else (0, 255)
    curved = quantizer.rotation is not None or quantizer.companding is not None
    fits = grid.offset == 0 and low <= grid.low_code and grid.high_code <= high
    if curved or not fits or form.step is None:
        return lambda _, args: (
            quantizer.quantize_input(args[0], form.step, feature_dim),
            *args[1:],
        )
    import torch.ao.quantization.fx._decomposed  # registers the operators

    ops, dtype = torch.ops.quantized_decomposed, torch.int8 if low else torch.uint8
    scale = float(form.step) * grid.spacing
    full = (grid.low_code, grid.high_code) == (low, high)

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] if full else args[0].clamp(grid.low_code * scale, grid.high_code * scale)
        codes = ops.quantize_per_tensor(x, scale, 0, low, high, dtype)
        return ops.dequantize_per_tensor(codes, scale, 0, low, high, dtype), *args[1:]

    return hook


def _replace(graph: "ir.Graph", source: Source, name: str) -> None:
    """Write a weight as integers, and let what used it use those."""
    import onnx_ir as ir

    key = f"{name}.weight".lstrip(".")
    weight = source.layers[name].weight
    sharing = [other for other, layer in source.layers.items() if layer.weight is weight]
    names = (f"{n}.weight".lstrip(".") for other in sharing for n in source.names_of(other))
    value = next((graph.initializers[n] for n in names if n in graph.initializers), None)
    if value is None:
        raise ValueError(
            f"the model does not use {name!r} in eval mode, and onnx holds what it computes: leave "
            "it in float with filter_fn, fogzo.quantize_(model, quantizer, filter_fn), or drop it "
            f"before the export, model.{name} = None"
        )
    products = []
    if holds.stored(source, name, "onnx").name.startswith("MatMulNBits"):
        products = _products(value)
    if products:
        packed = _matmul_inputs(weight)
        tensors = [_add_initializer(graph, f"{key}_{part}", t) for part, t in packed.items()]
        for product in products:
            _replace_matmul(graph, product, weight, tensors)
        key += "_float"
    if value.uses():  # also what reads the weight otherwise, as a tied decoder
        ir.convenience.replace_all_uses_with(value, _dequantized(graph, key, source, name))
    del graph.initializers[cast(str, value.name)]


def _block(weight: IntegerWeight) -> int:
    """How many inputs share a scale in the file; the last block of a row may be filled up."""
    inputs = weight.integers.shape[1]
    if weight.group_size is not None:
        return max(block for block in _BLOCKS if weight.group_size % block == 0)
    return next((block for block in _BLOCKS if inputs <= block), _BLOCKS[-1])


def _bits(weight: IntegerWeight) -> int:
    return next(bits for bits in (2, 4, 8) if weight.num_levels <= 2**bits)


def _matmul_inputs(weight: IntegerWeight) -> dict[str, Tensor]:
    """Packed integers, scales and, where it is not the middle, the integer that stands for zero."""
    outputs, inputs = weight.integers.shape
    block, bits = _block(weight), _bits(weight)
    blocks = -(-inputs // block)
    # Operators of 8 bits know no zero but 128.
    u = weight.integers.int() + 128 if bits == 8 else weight.unsigned()
    scale = weight.scale if bits == 8 else weight.step
    zero = 128 if bits == 8 else weight.zero
    u = torch.nn.functional.pad(u, (0, blocks * block - inputs))
    scales = scale.expand(outputs, -1)
    scales = scales.repeat_interleave(blocks // scales.shape[1], 1).contiguous()
    packed = {
        "codes": pack_digits(u, 2**bits).reshape(outputs, blocks, block * bits // 8),
        "scales": scales,
    }
    if zero != 2 ** (bits - 1):
        packed["zeros"] = torch.full_like(scales, zero)
    return packed


def _products(value: "ir.Value") -> "list[ir.Node]":
    """The nodes that multiply their first input by a transposed weight, as a linear layer does."""
    found = []
    for node, place in value.uses():
        if node.op_type == "Transpose":
            users = node.outputs[0].uses()
            found += [user for user, at in users if user.op_type == "MatMul" and at == 1]
        elif node.op_type == "Gemm" and place == 1:
            whole = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
            turned = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
            if whole == [1.0, 1.0] and turned == [0, 1]:
                found.append(node)
    return found


def _replace_matmul(
    graph: "ir.Graph", product: "ir.Node", weight: IntegerWeight, tensors: "list[ir.Value]"
) -> None:
    """Replace one of the `_products`, and the transposition that nothing else needs."""
    import onnx_ir as ir

    outputs, inputs = weight.integers.shape
    attributes = {
        **{"K": inputs, "N": outputs, "bits": _bits(weight), "block_size": _block(weight)},
        "accuracy_level": 0,  # as it is written: no rounding of inputs to 8 bits
    }
    x, result = product.inputs[0], product.outputs[0]
    before = None if product.op_type == "Gemm" else cast(ir.Value, product.inputs[1]).producer()
    added = [ir.node("MatMulNBits", [x, *tensors], attributes, domain="com.microsoft")]
    if len(product.inputs) > 2:
        added.append(ir.node("Add", [added[0].outputs[0], product.inputs[2]]))
    last = added[-1].outputs[0]
    last.shape, last.type = result.shape, result.type
    graph.insert_before(product, added)
    ir.convenience.replace_all_uses_with(result, last, replace_graph_outputs=True)
    graph.remove(product, safe=True)
    if before is not None and not before.outputs[0].uses():
        graph.remove(before, safe=True)


def _dequantized(graph: "ir.Graph", key: str, source: Source, name: str) -> "ir.Value":
    """The weight as DequantizeLinear computes it, once, before the first node."""
    import onnx_ir as ir

    layer = source.layers[name].weight
    bits = 4 if holds.stored(source, name, "onnx").name.endswith("int4") else 8
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    attributes: dict[str, Any] = {}
    integers, scale = layer.integers.to(torch.int8), layer.scale
    grouped = layer.group_size is not None
    if grouped:
        attributes = {"axis": 1, "block_size": layer.group_size}
    else:
        integers = from_rows(integers, layer.shape, layer.output_dim).contiguous()
        attributes = {} if scale.numel() == 1 else {"axis": layer.output_dim}
        scale = scale.reshape(()) if scale.numel() == 1 else scale.flatten()
    inputs = [
        _add_initializer(graph, f"{key}_codes", integers, dtype),
        _add_initializer(graph, f"{key}_scales", scale.contiguous()),
    ]
    added = [ir.node("DequantizeLinear", inputs, attributes)]
    if grouped and len(layer.shape) > 2:
        rest = [size for dim, size in enumerate(layer.shape) if dim != layer.output_dim]
        shape = torch.tensor([len(integers), *rest])
        rows = _add_initializer(graph, f"{key}_shape", shape)
        added.append(ir.node("Reshape", [added[-1].outputs[0], rows]))
        if layer.output_dim:
            order = list(range(1, len(layer.shape)))
            order.insert(layer.output_dim, 0)
            added.append(ir.node("Transpose", [added[-1].outputs[0]], {"perm": order}))
    graph.insert_before(graph[0], added)
    return added[-1].outputs[0]


def _add_initializer(
    graph: "ir.Graph", name: str, tensor: Tensor, dtype: "ir.DataType | None" = None
) -> "ir.Value":
    import onnx_ir as ir

    array = tensor.detach().cpu().numpy()
    if dtype is not None:
        array = array.astype(dtype.numpy())
    held = ir.tensor(array, dtype=dtype, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(held.dtype), const_value=held
    )
    graph.register_initializer(value)
    return value


def _arguments(source: Source, example: Any) -> list[Tensor]:
    """The tensors of an example in the order of the graph's inputs."""
    values: list[Any] = []
    _each(values.append, example)
    return [value for value in values if isinstance(value, Tensor)]


def _decoded(graph: "ir.Graph", source: Source, name: str) -> Tensor:
    """A weight from the tensors in the file, as its operator is defined."""
    weight = source.layers[name].weight
    key = f"{source.ties().get(name, name)}.weight".lstrip(".")
    parts = {
        part: _tensor(graph, f"{key}_{part}")
        for part in ("codes", "scales", "zeros")
        if f"{key}_{part}" in graph.initializers
    }
    codes, scales = parts["codes"], parts["scales"]
    outputs, inputs = weight.integers.shape
    if codes.dtype == torch.uint8:  # of MatMulNBits
        bits = _bits(weight)
        u = unpack_digits(codes.flatten(1), 2**bits, 8 // bits * codes.flatten(1).shape[1])
        zeros = parts.get("zeros", torch.full_like(scales, 2 ** (bits - 1)))
        levels = u.unflatten(1, (scales.shape[1], -1)) - zeros.unsqueeze(-1)
        return (levels * scales.unsqueeze(-1)).flatten(1)[:, :inputs]
    if weight.group_size is not None:
        groups = codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)
        return from_rows(groups.flatten(1), weight.shape, weight.output_dim)
    shape = [1] * len(weight.shape)
    if scales.numel() > 1:
        shape[weight.output_dim] = outputs
    return codes * scales.reshape(shape)


def _tensor(graph: "ir.Graph", name: str) -> Tensor:
    array = cast(Any, graph.initializers[name].const_value).numpy()
    return torch.from_numpy(array.astype("int8" if array.dtype.name == "int4" else array.dtype))
