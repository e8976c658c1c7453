"""What llama.cpp and OpenVINO make of exported files, and what rounding step sizes costs.

    python experiments/serving.py [--quick] [--output-dir FOLDER]

A byte-level LLaMA is trained in float for a minute, then for some steps with each quantizer, and
exported in each type of gguf that fogzo writes and in both variants of onnx. Every file is run on
held-out text by its reader, and the reader's logits are compared with the trained network's. The
speed is that of a LLaMA of 28M random weights in the same types, on one thread, interleaved.

llama-cpp-python and openvino are no dependencies of fogzo: pip install llama-cpp-python openvino.
Without one of them its rows say so. Writes results.json.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fogzo
from fogzo.export import export, gguf, onnx
from fogzo.export.source import Options, Source
from fogzo.export.verify import answer
from fogzo_lab.bench.timing import stopwatch
from fogzo_lab.comparison.tables import where
from fogzo_lab.interleaved import Turns, take_turns
from fogzo_lab.recipes import RECIPES
from fogzo_lab.system.environment import environment
from fogzo_lab.system.json_files import dumps, write_text
from fogzo_lab.table import Table
from fogzo_lab.training.config import TrainConfig
from fogzo_lab.training.loop import train
from fogzo_lab.training.model_config import LlamaConfig, QuantizerConfig
from fogzo_lab.training.models import Shapes, build_model, float_model
from fogzo_lab.training.state import load_weights
from fogzo_lab.training.tasks import load_task

FOLDER = Path(__file__).parent / "serving"
HALF = "float16"
GGUF = {
    "F32": None,
    "TQ2_0": QuantizerConfig(preset="ternary", scale_dtype=HALF),
    "TQ1_0": QuantizerConfig(preset="ternary", scale_dtype=HALF),
    "Q1_0": QuantizerConfig(preset="sign", scale_dtype=HALF),
    "Q2_0": QuantizerConfig(
        preset="lsq", bits=2, levels="integer", granularity=64, scale_dtype=HALF
    ),
    "Q2_K": QuantizerConfig(preset="lsq", bits=2, scale_dtype=HALF),
    "Q3_K": QuantizerConfig(preset="lsq", bits=3, scale_dtype=HALF),
    "Q4_0": QuantizerConfig(preset="lsq", bits=4, granularity=32, scale_dtype=HALF),
    "Q5_0": QuantizerConfig(preset="lsq", bits=4, levels="half", scale_dtype=HALF),
    "Q8_0": QuantizerConfig(preset="lsq", bits=8, scale_dtype=HALF),
}
"""By type, what is trained for it; F32 is a plain file of Q2_K's weights."""

ON_REQUEST = ("TQ1_0", "Q1_0", "Q2_0")
ONNX = {
    "lsq(2), MatMulNBits": (QuantizerConfig(preset="lsq", bits=2, scale_dtype=HALF), "nbits"),
    "lsq(2), DequantizeLinear": (QuantizerConfig(preset="lsq", bits=2, scale_dtype=HALF), "qdq"),
    "lsq(4), MatMulNBits": (
        QuantizerConfig(preset="lsq", bits=4, granularity=32, scale_dtype=HALF),
        "nbits",
    ),
}
IN_BLOCKS_OF_256 = ("TQ2_0", "TQ1_0", "Q2_K", "Q3_K")
INPUTS = fogzo.abs_max(8, granularity=256)
PROMPT = 64
READERS = {"llama_cpp": "llama-cpp-python", "openvino": "openvino"}
"""By module, the package that brings it."""


def installed(module: str) -> bool:
    """Whether a reader is there."""
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little networks, to see that it runs")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), options.quick)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(options.output_dir / "results.json", dumps(results, indent=1) + "\n")


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """All that the tables show."""
    missing = [name for name in READERS if not installed(name)]
    here = {name: version(package) for name, package in READERS.items() if name not in missing}
    recipe = RECIPES["pydoc-llama"]()
    base = replace(
        recipe,
        model=LlamaConfig(width=256, depth=1, heads=4),
        data=replace(recipe.data, max_eval_blocks=16),
        estimator="ste",
        quantizer=QuantizerConfig(),
        max_steps=2 if quick else 150,
        output_dir=folder / "float",
        overwrite=True,
    )
    train(base)
    networks = Networks(base, folder, 1 if quick else 10)
    return {
        "environment": environment() | here,
        "missing": {name: f"pip install {READERS[name]}" for name in missing},
        "prompt_tokens": PROMPT,
        "trained_steps": [base.max_steps, networks.steps],
        "rounded": [rounded(networks, form, dtype) for form, dtype in ROUNDED],
        "llama.cpp": [] if "llama_cpp" in missing else llama_cpp_cases(networks, quick),
        "openvino": [] if "openvino" in missing else openvino_cases(networks),
    }


class Networks:
    """A network trained with any quantizer, starting from the float run."""

    def __init__(self, base: TrainConfig, folder: Path, steps: int) -> None:
        self.base, self.folder, self.steps = base, folder, steps
        self.task = load_task(base)
        blocks = self.task.splits["validation"].batch(torch.arange(16))
        self.tokens, self.targets = blocks[:, :PROMPT], blocks[:, 1 : PROMPT + 1]
        self._trained: dict[QuantizerConfig, Path] = {}

    def get(self, quantizer: QuantizerConfig) -> nn.Module:
        """The network, in eval mode."""
        config = replace(
            self.base,
            quantizer=quantizer,
            initial_weights=self.base.output_dir,
            max_steps=self.steps,
            learning_rate=1e-3,
            output_dir=self.folder / f"run-{len(self._trained)}",
        )
        if quantizer not in self._trained:
            train(config)
            self._trained[quantizer] = config.output_dir
        model = build_model(config, self.task.shapes)
        load_weights(model, self._trained[quantizer])
        return model.eval()


ROUNDED = (("gguf", torch.float16), ("mlx", torch.bfloat16))


def rounded(networks: Networks, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """What --round-steps does to a network that was trained with steps in float32."""
    model = networks.get(QuantizerConfig(preset="lsq", bits=2))
    before = answer(model, networks.tokens)
    source = Source.of(model, Options(round_steps=True))
    weights = {name: layer.weight.round_steps(dtype) for name, layer in source.layers.items()}
    after = answer(source.with_weights(weights).baked(), networks.tokens)
    losses = [cross_entropy(logits.transpose(1, 2), networks.targets) for logits in (before, after)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "step_rounding": max(
            float(((w.step - layer.weight.step).abs() / layer.weight.step).max())
            for w, layer in zip(weights.values(), source.layers.values(), strict=True)
        ),
        "loss": float(losses[0]),
        "loss_change": float(losses[1] - losses[0]),
        **compared(after, before),
    }


def compared(found: Tensor, expected: Tensor) -> dict[str, float]:
    """A relative error in norm, and how often the likeliest token is the same."""
    return {
        "error": float((found - expected).norm() / expected.norm()),
        "top1": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


def llama_cpp_cases(networks: Networks, quick: bool) -> list[dict[str, Any]]:
    """A case for every type: errors on trained networks, speed on a large one."""
    cases = []
    for name, quantizer in GGUF.items():
        model = networks.get(quantizer or GGUF["Q2_K"])
        path = write_gguf(model, name, networks.folder / f"gguf-{name}")
        with LlamaCpp(path) as reader:
            found = torch.stack([reader(row) for row in networks.tokens])
        case = {"name": name, **compared(found, answer(model, networks.tokens))}
        if name in IN_BLOCKS_OF_256:
            same = answer(with_rounded_inputs(model), networks.tokens)
            case["error_with_rounded_inputs"] = compared(found, same)["error"]
        cases.append(case)
    for case, timed in zip(cases, llama_cpp_speeds(networks.folder, quick), strict=True):
        case |= timed
    return cases


def with_rounded_inputs(model: nn.Module) -> nn.Module:
    """The same weights, with inputs rounded as llama.cpp does it for types in blocks of 256."""
    source = Source.of(model, Options())
    plain = source.baked()

    def round_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return INPUTS.quantize_input(args[0], None, -1), *args[1:]

    for name in source.layers:
        plain.get_submodule(name).register_forward_pre_hook(round_input)
    return plain


def write_gguf(model: nn.Module, name: str, folder: Path) -> Path:
    """The file of a type."""
    if name == "F32":
        source = Source.of(model, Options())
        folder.mkdir()
        gguf.write(Source(source.baked(), {}, source.options), folder)
    else:
        variant = name.lower() if name in ON_REQUEST else None
        report = export(model, folder, "gguf", variant=variant, verify=False)
        assert {layer.stored for layer in report.layers} == {name}
    return folder / gguf.FILE


class LlamaCpp:
    """A gguf file in llama.cpp, on one thread."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        threads = {"n_threads": 1, "n_threads_batch": 1}
        self.model = llama_cpp.Llama(
            str(path), n_ctx=2 * PROMPT, logits_all=True, verbose=False, **exact, **threads
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits of token ids of shape (length,)."""
        self.model.reset()
        self.model.eval(tokens.tolist())
        return torch.tensor(self.model.scores[: len(tokens)])

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *error: object) -> None:
        self.model.close()


def llama_cpp_speeds(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Sizes and speeds of every type, all loaded at once."""
    width, depth = (256, 1) if quick else (512, 8)
    torch.manual_seed(0)  # noqa: TID251 -- a script of its own
    config = LlamaConfig(width=width, depth=depth, heads=width // 64)
    plain = float_model(config, Shapes(256, context=2 * PROMPT)).eval()
    readers, sizes = {}, {}
    for name, options in GGUF.items():
        quantizer = (options or GGUF["Q2_K"]).build()
        assert quantizer is not None
        model = fogzo.quantize_(copy.deepcopy(plain), quantizer)
        path = write_gguf(model, name, folder / f"large-{name}")
        sizes[name], readers[name] = path.stat().st_size, LlamaCpp(path)
    tokens = torch.randint(256, (PROMPT,))
    turns = interleaved(
        {
            (name, kind): (lambda reader=reader, part=part: reader(part))
            for name, reader in readers.items()
            for kind, part in (("prompt", tokens), ("token", tokens[:1]))
        },
        rounds=2 if quick else 9,
    )
    seconds = turns.seconds()
    return [
        {
            "bytes": sizes[name],
            "weights": sum(p.numel() for p in plain.parameters()),
            **{f"{kind}_seconds": seconds[f"{name}: {kind}"] for kind in ("prompt", "token")},
        }
        for name in GGUF
    ]


def interleaved(calls: dict[tuple[str, str], Callable[[], object]], rounds: int) -> Turns:
    """Functions timed in turns of about a twentieth of a second of CPU time."""
    timed, counts = {}, {}
    for (name, kind), function in calls.items():
        function()
        key = f"{name}: {kind}"
        timed[key] = stopwatch(function, torch.device("cpu"), clock=time.process_time)
        counts[key] = max(1, int(0.05 / timed[key](1)))
    return take_turns(timed, counts, rounds)


def openvino_cases(networks: Networks) -> list[dict[str, Any]]:
    """Both variants of onnx in OpenVINO, at full precision and as it computes by default."""
    import openvino

    cases = []
    for name, (quantizer, variant) in ONNX.items():
        model = networks.get(quantizer)
        folder = networks.folder / f"onnx-{len(cases)}"
        export(model, folder, "onnx", variant=variant, example=networks.tokens, verify=False)
        expected = answer(model, networks.tokens)
        found = {}
        for kind, settings in OPENVINO.items():
            core = openvino.Core()
            compiled = core.compile_model(
                str(folder / onnx.FILE), "CPU", settings | {"INFERENCE_NUM_THREADS": 1}
            )
            logits = torch.from_numpy(compiled(networks.tokens.numpy())[0])
            found[kind] = compared(logits, expected)
        cases.append({"name": name, **found})
    return cases


OPENVINO = {
    "full": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0},
    "default": {},
}


def table(results: dict[str, Any]) -> Table:
    """What llama.cpp makes of the types of gguf."""
    rows = []
    for case in results["llama.cpp"]:
        rounded_too = case.get("error_with_rounded_inputs")
        rows.append(
            [
                case["name"],
                f"{case['error']:.1g}",
                "" if rounded_too is None else f"{rounded_too:.1g}",
                f"{case['top1']:.1%}",
                f"{case['bytes'] / 1e6:.3g}",
                f"{PROMPT / case['prompt_seconds']:,.0f} / {1 / case['token_seconds']:,.0f}",
            ]
        )
    heading = ["type", "error", "error, inputs rounded alike", "same top token", "MB"]
    heading += ["tokens/s of a prompt / one by one"]
    weights = results["llama.cpp"][0]["weights"]
    caption = (
        "Error of llama.cpp's logits on held-out text, in norm, over those of the trained network: "
        "as it was trained, and with its inputs rounded to 8 bits in groups of 256. Sizes and "
        f"speeds are of a LLaMA of {weights / 1e6:.0f}M weights, one thread, medians of "
        f"interleaved turns, in CPU time. {where(results['environment'])}"
    )
    return Table("", heading, rows, caption)


def rounding_table(results: dict[str, Any]) -> Table:
    """What --round-steps costs."""
    rows = [
        [
            case["dtype"],
            f"{case['step_rounding']:.1e}",
            f"{case['error']:.1e}",
            f"{case['top1']:.1%}",
            f"{case['loss']:.3f}",
            f"{case['loss_change']:+.1e}",
        ]
        for case in results["rounded"]
    ]
    heading = ["steps rounded to", "steps move by", "logits, in norm", "same top token"]
    heading += ["loss, nats", "its change"]
    caption = "`lsq(2)` trained with steps in float32, on held-out text."
    return Table("", heading, rows, caption)


def openvino_table(results: dict[str, Any]) -> Table:
    """What OpenVINO makes of onnx."""
    rows = [
        [
            case["name"],
            f"{case['full']['error']:.1g}",
            f"{case['full']['top1']:.1%}",
            f"{case['default']['error']:.1g}",
            f"{case['default']['top1']:.1%}",
        ]
        for case in results["openvino"]
    ]
    heading = ["file", "error", "same top token", "error by default", "same top token by default"]
    settings = ", ".join(f"{name}={value}" for name, value in OPENVINO["full"].items())
    caption = (
        f"OpenVINO {results['environment']['openvino']}'s logits on held-out text, in norm, over "
        f"those of the trained network: with {settings}, and by default."
    )
    return Table("", heading, rows, caption)


if __name__ == "__main__":
    main()
