"""What an exported LLaMA takes to store, load, hold and run, beside the same in float."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fogzo import abs_max, lsq, quantize_, ternary
from fogzo.export import export, onnx
from fogzo.export.source import Options, Source
from fogzo.export.verify import answer, difference
from fogzo.quantizers import Quantizer
from fogzo_lab.bench.cases import Case, Facts, reason
from fogzo_lab.bench.config import BenchConfig, Suite
from fogzo_lab.bench.serving import Server
from fogzo_lab.bench.timing import turns_within
from fogzo_lab.interleaved import Timed
from fogzo_lab.training.model_config import LlamaConfig
from fogzo_lab.training.models import Shapes, float_model

Write = Callable[[nn.Module, Path, Tensor], None]

SIZES: dict[Suite, tuple[int, int, int]] = {
    "tiny": (256, 1, 8),
    "quick": (256, 4, 64),
    "full": (512, 8, 64),
}
"""Width, blocks, and tokens of the prompt; widths of 256, as the blocks of gguf."""


@dataclass(frozen=True)
class Served:
    """A way to serve a network.

    Attributes:
        name: Of the row: format, quantizer, and how the file holds it.
        reader: Which loads it.
        weights: How the network is quantized.
        write: Exports it.
        inputs: How its inputs are quantized.
        tiny: Whether the smallest suite serves it too.
    """

    name: str
    reader: str
    weights: Quantizer
    write: Write
    inputs: Quantizer | None = None
    tiny: bool = False


def run(config: BenchConfig, device: torch.device) -> Iterator[Case]:
    """A case for every way to serve, on CPUs, which all of the readers know; the first is float."""
    width, blocks, length = SIZES[config.suite]
    plain = float_model(
        LlamaConfig(width=width, depth=blocks, heads=width // 64),
        Shapes(num_outputs=256, context=max(length, 64)),
    ).eval()
    tokens = torch.randint(256, (1, length))
    for group in GROUPS:
        ways = [way for way in group if way.tiny or config.suite != "tiny"]
        yield from compare(plain, ways, tokens, config)


def compare(
    plain: nn.Module, ways: list[Served], tokens: Tensor, config: BenchConfig
) -> Iterator[Case]:
    """A case for each way, timed beside the first."""
    with ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        facts: dict[str, Facts] = {}
        failures: dict[str, str] = {}
        timed: dict[str, Timed] = {}
        for number, way in enumerate(ways):
            own: Facts = {"reader": way.reader, "prompt_tokens": tokens.shape[1]}
            try:
                server, measured = serve(way, plain, Path(folder, str(number)), tokens, config)
            except Exception as error:  # a reader's may be anything
                failures[way.name] = reason(error)
                facts[way.name] = own
            else:
                running.enter_context(server)
                facts[way.name] = {**own, **measured}
                timed[f"{way.name}: prompt"] = partial(server.answer, tokens.shape[1])
                timed[f"{way.name}: token"] = partial(server.answer, 1)
        base = ways[0].name
        turns = None if base in failures else turns_within(timed, config.limits)
        for way in ways:
            if turns is None or way.name in failures:
                why = failures.get(way.name) or f"{base} failed: {failures[base]}"
                yield Case(name=way.name, facts=facts[way.name], skipped=why)
                continue
            seconds, kinds = turns.seconds(), ("prompt", "token")
            yield Case(
                name=way.name,
                facts=facts[way.name],
                rounds=len(turns.rounds),
                seconds={kind: seconds[f"{way.name}: {kind}"] for kind in kinds},
                ratios={
                    f"{kind}, speed over float": turns.ratio(
                        f"{base}: {kind}", f"{way.name}: {kind}"
                    )
                    for kind in kinds
                },
            )


def serve(
    way: Served, plain: nn.Module, folder: Path, tokens: Tensor, config: BenchConfig
) -> tuple[Server, dict[str, Any]]:
    """A process that serves the network in this way, and what it takes."""
    model = quantized(plain, way)
    way.write(model, folder, tokens)
    server = Server(way.reader, folder, tokens, config.threads)
    return server, {
        "weights": sum(p.numel() for p in plain.parameters()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "load_seconds": server.load_seconds,
        "resident_bytes": server.resident_bytes,
        "logits_difference": difference(server.logits, answer(model, tokens)),
    }


def quantized(plain: nn.Module, way: Served) -> nn.Module:
    """A copy of the network, quantized but for its head and its embedding."""
    return quantize_(copy.deepcopy(plain), way.weights, activations=way.inputs)


def _export(format: str) -> Write:
    def write(model: nn.Module, folder: Path, tokens: Tensor) -> None:
        # Whether it is right shows in the first answer of what reads it.
        export(model, folder, format, example=tokens, verify=False)

    return write


def _float_onnx(model: nn.Module, folder: Path, tokens: Tensor) -> None:
    """The file without any layer in integers."""
    source = Source.of(model, Options())
    folder.mkdir()
    onnx.write(replace(source, layers={}, example=tokens), folder)


def _onnx_of_rounded_inputs(model: nn.Module, folder: Path, tokens: Tensor) -> None:
    """The file with the permission to round inputs to 8 bits, which most exporters give."""
    import onnx_ir as ir

    _export("onnx")(model, folder, tokens)
    graph = ir.load(folder / onnx.FILE)
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)
    ir.save(graph, folder / onnx.FILE)


_TWO_BITS = lsq(2, scale_dtype=torch.float16)
_FOUR_BITS = lsq(4, granularity=32)
_TOKEN = abs_max(8, granularity="token")
GROUPS = (
    (
        Served("float", "transformers", _TWO_BITS, _export("float"), tiny=True),
        Served("packed: lsq(2) in 2 bits", "transformers", _TWO_BITS, _export("packed"), tiny=True),
        Served("packed: ternary in 1.6 bits", "transformers", ternary(), _export("packed")),
        Served(
            "compressed-tensors: lsq(2) as W4",
            "transformers",
            _TWO_BITS,
            _export("compressed-tensors"),
        ),
        Served("gguf: lsq(2) as Q2_K", "gguf in transformers", _TWO_BITS, _export("gguf")),
        Served(
            "bitnet: ternary in 2 bits, inputs in 8",
            "transformers",
            ternary(),
            _export("bitnet"),
            _TOKEN,
        ),
    ),
    (
        Served("onnx: float", "onnxruntime", _TWO_BITS, _float_onnx, tiny=True),
        Served("onnx: lsq(2) in 2 bits", "onnxruntime", _TWO_BITS, _export("onnx"), tiny=True),
        Served("onnx: lsq(4) in 4 bits", "onnxruntime", _FOUR_BITS, _export("onnx")),
        Served(
            "onnx: lsq(4) in 4 bits, inputs rounded to int8",
            "onnxruntime",
            _FOUR_BITS,
            _onnx_of_rounded_inputs,
        ),
    ),
)
"""What is timed together, in float first."""
