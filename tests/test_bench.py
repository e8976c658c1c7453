"""fogzo bench: what it reports, by hand where it computes, and never how fast anything is."""

import copy
import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from functools import partial, partialmethod

import pytest
import torch
from torch import nn
from torch.multiprocessing import start_processes

import fogzo
from fogzo.quantizers.smoothing import Rademacher, with_radius
from fogzo.quantizers.surrogates import identity
from fogzo_lab.bench import mezo, ranks
from fogzo_lab.bench.cases import NotHereError, reason
from fogzo_lab.bench.comparing import compare
from fogzo_lab.bench.config import SECTION_NAMES, BenchConfig, Limits
from fogzo_lab.bench.networks import mlp
from fogzo_lab.bench.peak_memory import peak_bytes
from fogzo_lab.bench.peers import LAYERS, Chain
from fogzo_lab.bench.plot import plot
from fogzo_lab.bench.ranks import RankSettings, time_on_ranks
from fogzo_lab.bench.sections import SECTIONS, compiled, export, layers, steps
from fogzo_lab.bench.serving import Server
from fogzo_lab.bench.stepping import Steps
from fogzo_lab.bench.suite import run_suite
from fogzo_lab.bench.timing import stopwatch, time_in_turns
from fogzo_lab.bench.views import peers_table, tables
from fogzo_lab.cli.main import main
from fogzo_lab.interleaved import Spread, Turns, take_turns
from fogzo_lab.training.model_config import LlamaConfig
from fogzo_lab.training.models import Shapes, float_model
from forked import start_server

CPU = torch.device("cpu")
TINY = BenchConfig(suite="tiny", device="cpu")
PEERS = ("torchao", "brevitas")


class Clock:
    """A clock that only the timed functions move, each by its own seconds in turn."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def takes(self, name, *seconds):
        turns = itertools.cycle(seconds)

        def function():
            self.now += next(turns)
            self.calls.append(name)

        return function


def hide_peers(patch):
    """They are not needed to test, and importing them where they are would take seconds."""
    imported = [name for name in sys.modules if name.partition(".")[0] in PEERS]
    for name in {*PEERS, *imported}:
        patch.setitem(sys.modules, name, None)


def fork_ranks(patch):
    """Fork the ranks from the server of the tests, which has imported what they need."""
    start_server()
    patch.setattr(ranks, "spawn", partial(start_processes, start_method="forkserver"))


def generate_no_code(patch):
    """Compile without generating and building code, of which a step takes many seconds."""
    patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))


@pytest.fixture(autouse=True)
def without_peers(monkeypatch):
    hide_peers(monkeypatch)


@pytest.fixture(scope="module")
def results():
    """The whole tiny suite, as results.json holds it."""
    with pytest.MonkeyPatch.context() as patch:
        hide_peers(patch)
        generate_no_code(patch)
        fork_ranks(patch)
        told = []
        found = run_suite(TINY, lambda *progress: told.append(progress))
    cases = sum(len(section["cases"]) for section in found["sections"].values())
    assert len(told) == cases + 1
    assert told[-1][:2] == (len(SECTION_NAMES), len(SECTION_NAMES))
    return json.loads(json.dumps(found))


def cases_of(results, section):
    return results["sections"][section]["cases"]


# The clock's arithmetic


def test_ratios_are_taken_within_a_round_and_not_between_medians():
    clock = Clock()
    slow_spell = {"a": clock.takes("a", 1.0, 10.0, 3.0), "b": clock.takes("b", 2.0, 20.0, 1.0)}
    timed = {name: stopwatch(function, CPU, 1, clock) for name, function in slow_spell.items()}
    turns = take_turns(timed, {"a": 1, "b": 1}, 3)
    assert turns.rounds == [{"a": 1.0, "b": 2.0}, {"a": 10.0, "b": 20.0}, {"a": 3.0, "b": 1.0}]
    assert turns.seconds() == {"a": 3.0, "b": 2.0}
    assert turns.ratio("b", "a") == Spread(2.0, (1 / 3 + 2.0) / 2, 2.0)
    assert turns.spread(lambda s: s["a"] + s["b"]).median == 4.0


def test_a_turn_ends_when_the_device_has_done_its_work(monkeypatch):
    clock, waited = Clock(), []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for device in (CPU, torch.device("cuda", 1)):
        stopwatch(clock.takes("a", 1.0, 1.0), device, 1, clock)(2)
    assert waited == [torch.device("cuda", 1)] * 2


def test_turns_change_their_direction():
    clock = Clock()
    timed = {name: stopwatch(clock.takes(name, 1.0), CPU, 1, clock) for name in "abc"}
    take_turns(timed, dict.fromkeys("abc", 1), 3)
    assert "".join(clock.calls) == "abccbaabc"


def test_seconds_are_those_of_one_step():
    clock = Clock()
    turns = take_turns({"a": stopwatch(clock.takes("a", 6.0, 10.0), CPU, 4, clock)}, {"a": 2}, 1)
    assert turns.rounds == [{"a": 2.0}]


@pytest.mark.parametrize(
    ("limits", "rounds"),
    [
        (Limits(100, 100.0), 20),  # 5 seconds a round
        (Limits(7, 100.0), 7),
        (Limits(100, 1.0), 7),  # no fewer than quartiles need
        (Limits(1, 1.0), 1),
    ],
)
def test_rounds_fit_into_the_limits_after_a_warm_up(limits, rounds):
    clock = Clock()
    functions = {"a": clock.takes("a", 2.0), "b": clock.takes("b", 3.0)}
    turns = time_in_turns(functions, limits, CPU, clock=clock)
    assert len(turns.rounds) == rounds
    assert clock.calls.count("a") == rounds + 3


def test_short_functions_are_called_several_times_a_turn():
    clock = Clock()
    functions = {"short": clock.takes("short", 2**-9), "long": clock.takes("long", 1.0)}
    turns = time_in_turns(functions, Limits(2, 100.0), CPU, clock=clock)
    assert clock.calls.count("short") == 3 + 2 * 3  # of 4 ms
    assert clock.calls.count("long") == 3 + 2
    assert turns.seconds() == pytest.approx({"short": 2**-9, "long": 1.0})


def test_the_overhead_is_what_a_step_costs_beyond_ste_over_its_forwards(monkeypatch):
    rounds = [
        {"STE step": 4.0, "forwards": 2.0, "floor": 6.0, "FOGZO step": 6.5, "free probes": 4.4},
        {"STE step": 8.0, "forwards": 4.0, "floor": 12.0, "FOGZO step": 13.2, "free probes": 8.8},
        {"STE step": 4.0, "forwards": 2.0, "floor": 6.0, "FOGZO step": 6.2, "free probes": 4.2},
    ]
    monkeypatch.setattr(steps, "time_in_turns", lambda *_: Turns(rounds))
    case = steps.measure(lambda device: mlp((4, 3, 2), 2, device), TINY, CPU)
    assert case.ratios["overhead"].median == pytest.approx(1.25)
    assert case.ratios["own work"].median == pytest.approx(0.2)
    assert case.ratios["FOGZO / floor"].median == pytest.approx(6.5 / 6)
    assert case.ratios["FOGZO / STE"].median == pytest.approx(1.625)
    assert case.facts["target"] == 1.3


@pytest.mark.parametrize(
    ("low", "high", "met"), [(1.0, 1.15, "yes"), (1.1, 1.2, "undecided"), (1.151, 1.2, "no")]
)
def test_a_target_between_the_quartiles_is_undecided(low, high, met):
    overhead = {"median": (low + high) / 2, "low": low, "high": high}
    case = {
        "name": "a network",
        "facts": {"target": 1.15},
        "seconds": {},
        "ratios": {"overhead": overhead},
        "skipped": None,
    }
    (table,) = tables({"sections": {"steps": {"cases": [case]}}})
    assert dict(zip(table.heading, table.rows[0], strict=True))["target, met"] == f"1.15: {met}"


def test_targets_tighten_with_the_number_of_weights():
    weights = (7_940, 499_999, 500_000, 4_999_999, 5_000_000)
    assert [steps.target(d) for d in weights] == [1.3, 1.3, 1.15, 1.15, 1.05]


# The sections


def test_every_section_gives_rows_of_one_shape(results):
    assert set(SECTIONS) == set(SECTION_NAMES)
    assert list(results["sections"]) == list(SECTION_NAMES)
    keys = {"name", "facts", "rounds", "seconds", "ratios", "skipped"}
    for name in SECTION_NAMES:
        assert cases_of(results, name)
        for case in cases_of(results, name):
            assert set(case) == keys
            peer = case["facts"].get("alternative", "").startswith(PEERS)
            assert case["skipped"] is None or peer, case["skipped"]


def test_every_number_is_finite_and_times_are_positive(results):
    timed = {name for name in SECTION_NAMES if any(c["ratios"] for c in cases_of(results, name))}
    assert timed >= {"steps", "layers", "compiled", "probes", "scaling"}
    for case in itertools.chain(*(cases_of(results, name) for name in SECTION_NAMES)):
        assert all(seconds > 0 for seconds in case["seconds"].values())
        assert bool(case["seconds"]) == bool(case["rounds"]) == bool(case["ratios"])
        for name, ratio in case["ratios"].items():
            assert all(map(math.isfinite, ratio.values()))
            assert ratio["low"] <= ratio["median"] <= ratio["high"]
            # A difference over a time may be anything while the machine is busy.
            assert name in ("overhead", "own work") or ratio["low"] > 0


def test_the_run_is_described(results):
    assert {"torch", "processor", "cores", "date"} <= set(results["environment"])
    assert (results["suite"], results["threads"], results["device"]) == ("tiny", 1, "cpu")


def test_steps_are_timed_beside_their_floor(results):
    for case in cases_of(results, "steps"):
        kinds = {"STE step", "forwards", "floor", "FOGZO step", "free probes"}
        assert set(case["seconds"]) == kinds
        assert set(case["ratios"]) == {"overhead", "own work", "FOGZO / floor", "FOGZO / STE"}
        assert {"quantized_weights", "num_samples", "target"} == set(case["facts"])
    names = [case["name"].partition(" ")[0] for case in cases_of(results, "steps")]
    assert names == ["MLP", "LLaMA", "ResNet"]


def test_lean_probes_hold_less_than_the_copy_of_all_weights(results):
    saved = []
    for case in cases_of(results, "memory"):
        facts = case["facts"]
        # The error of an agreement may look at a sample of 4096 weights, at a few numbers of each.
        sample = 8 * 4 * 4096 / facts["weight_bytes"]
        # Activations of the STE step may outweigh the weights, and set the peak.
        assert 0 <= facts["lean_copies"] <= facts["default_copies"] < 2 + sample
        assert facts["ste_peak_bytes"] > facts["weight_bytes"]
        saved.append(facts["default_copies"] - facts["lean_copies"])
    assert max(saved) > 0.5


def test_layers_are_compared_with_the_float_layer(results):
    by_shape = {}
    for case in cases_of(results, "layers"):
        by_shape.setdefault(case["facts"]["layer"], []).append(case)
    assert len(by_shape) == len(layers.SHAPES["tiny"])
    for cases in by_shape.values():
        assert [case["facts"]["alternative"] for case in cases] == list(LAYERS)
        assert cases[0]["ratios"]["over base"] == {"median": 1, "low": 1, "high": 1}


def test_compiled_steps_stand_beside_eager_ones(results):
    (case,) = cases_of(results, "compiled")
    assert case["skipped"] is None
    assert set(case["seconds"]) == {
        f"{kind} step, {mode}" for kind in ("STE", "FOGZO") for mode in ("eager", "compiled")
    }


def test_a_step_that_compiles_anew_is_a_row_that_says_so(monkeypatch):
    network = mlp((8, 4, 2), 4, CPU)
    # The first steps are 3 of STE and 3 of FOGZO, with one forward pass and with three, in both
    # modes, and where nothing flips the closure is evaluated some times more.
    lengths = itertools.chain(itertools.repeat(4, 30), itertools.count(5))
    growing = replace(network, loss_of=lambda n: network.model(torch.ones(next(lengths), 8)).sum())
    monkeypatch.setitem(steps.NETWORKS["tiny"], "small MLP", lambda device: growing)
    generate_no_code(monkeypatch)
    (case,) = compiled.run(TINY, CPU)
    assert "recompile" in case.skipped


def test_a_missing_peer_is_a_row_that_says_so(results):
    skipped = {
        case["facts"]["alternative"].partition(",")[0]: case["skipped"]
        for case in cases_of(results, "layers")
        if case["skipped"]
    }
    assert skipped == {name: f"{name} is not installed" for name in PEERS}


def test_probes_are_compared_with_their_own_base(results):
    kinds = {}
    for case in cases_of(results, "probes"):
        kinds.setdefault(case["facts"]["kind"], set()).add(case["facts"]["alternative"])
    products = "products of input and weights alone"
    assert kinds["at once"] == {"one by one", "at once", products}
    assert kinds["MeZO"] == {"SpsaEstimator", "MeZO, same noise", "MeZO, normal noise"}
    assert {"one-sided", "every 4th step", "1/8 of the batch", "bf16 autocast"} < kinds["cheaper"]


def test_scaling_sweeps_weights_samples_batch_ranks_and_memory(results):
    sweeps = {}
    for case in cases_of(results, "scaling"):
        sweeps.setdefault(case["facts"]["sweep"], []).append(case["facts"]["value"])
    assert sweeps == {
        "width": [4, 8],
        "n": [1, 2],
        "batch": [2, 4],
        "ranks": [1, 2],
        "memory": [4, 8],
    }


def test_the_callers_threads_and_random_stream_are_left_alone():
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    run_suite(replace(TINY, only=("layers",), threads=threads + 1))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


def test_the_full_suite_compiles_each_layer(monkeypatch):
    compiled = []

    def pretend(layer, **options):
        compiled.append(layer)
        if isinstance(layer, Chain):
            raise RuntimeError("no compiler\non this machine")
        return layer

    monkeypatch.setattr(torch, "compile", pretend)
    monkeypatch.setitem(layers.SHAPES, "full", layers.SHAPES["tiny"][:1])
    config = BenchConfig(suite="full", rounds=1, seconds=1e-9)
    cases = list(layers.run(config, CPU))
    count = len(LAYERS)
    assert [case.facts["mode"] for case in cases] == ["eager"] * count + ["compiled"] * count
    assert len(compiled) == count - len(PEERS)
    skipped = {case.facts["alternative"]: case.skipped for case in cases[count:] if case.skipped}
    assert skipped["chain of torch operations"] == "RuntimeError: no compiler"


# What cannot run


def test_a_network_without_its_library_is_a_row_and_the_others_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("steps", "memory"):
        cases = list(SECTIONS[name](replace(TINY, rounds=1), CPU))
        assert [case.skipped for case in cases] == [None, *["transformers is not installed"] * 2]


def test_an_alternative_that_fails_leaves_the_others_their_numbers():
    def breaks():
        raise NotHereError("no such device")

    def never():
        raise AssertionError

    limits = Limits(1, 1e-9)
    makers = {"base": lambda: int, "breaks": lambda: breaks, "cannot be built": never}
    cases = {
        case.facts["alternative"]: case for case in compare("t", makers, "base", {}, limits, CPU)
    }
    assert cases["base"].skipped is None
    assert cases["breaks"].skipped == "no such device"
    assert cases["cannot be built"].skipped == "AssertionError"
    no_base = list(compare("t", makers, "breaks", {}, limits, CPU))
    assert [case.skipped for case in no_base[:2]] == [
        "breaks failed: no such device",
        "no such device",
    ]


def test_served_networks_answer_as_the_trained_ones(results):
    cases = cases_of(results, "export")
    assert [case["name"].partition(":")[0] for case in cases] == ["float", "packed", "onnx", "onnx"]
    for case in cases:
        facts = case["facts"]
        assert facts["logits_difference"] < 2e-6
        assert facts["load_seconds"] > 0
        assert facts["resident_bytes"] is None or facts["resident_bytes"] > 0
        assert set(case["seconds"]) == {"prompt", "token"}
    in_float, packed = (case["facts"]["bytes"] for case in cases[:2])
    assert packed < 0.25 * in_float  # of a head and an embedding in float


def test_what_cannot_be_served_is_a_row_that_says_so(monkeypatch, tmp_path):
    def refuse(model, folder, tokens):
        raise ValueError("no such format")

    def nothing(model, folder, tokens):
        folder.mkdir()

    ways = [
        replace(export.GROUPS[0][0], name="written by nobody", write=refuse),
        replace(export.GROUPS[0][0], name="empty", write=nothing),
    ]
    monkeypatch.setattr(export, "GROUPS", (ways, ways[1:]))
    cases = list(export.run(replace(TINY, rounds=1), CPU))
    said = [case.skipped for case in cases]
    assert said[0] == "ValueError: no such format"
    assert "Error" in said[1] and "\n" not in said[1]  # the reader's own
    assert said[2].partition(":")[0] == said[1].partition(":")[0]


def test_a_server_that_ends_is_no_answer(tmp_path):
    way = export.GROUPS[0][0]
    plain = float_model(LlamaConfig(width=16, depth=1, heads=2), Shapes(num_outputs=8, context=8))
    tokens = torch.tensor([[1, 2, 3]])
    way.write(export.quantized(plain, way), tmp_path / "out", tokens)
    with Server(way.reader, tmp_path / "out", tokens, 1) as server:
        assert server.logits.shape == (1, 3, 8)
        assert server.answer(2, 3) > 0
        server._process.kill()
        with pytest.raises(NotHereError, match="its process ended"):
            server.answer(2, 1)


def test_reasons_are_one_line():
    assert reason(ModuleNotFoundError("No module", name="a.b")) == "a is not installed"
    assert reason(ValueError("first\nsecond")) == "ValueError: first"
    assert len(reason(ValueError("x" * 1000))) < 200


def test_without_gloo_ranks_are_rows_that_say_so(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    cases = list(SECTIONS["scaling"](replace(TINY, rounds=1), CPU))
    said = [case.skipped for case in cases if case.facts["sweep"] == "ranks"]
    assert said == ["this build of torch has no gloo"] * 2


def test_a_rank_that_fails_says_why(monkeypatch):
    fork_ranks(monkeypatch)
    settings = RankSettings(ranks=1, widths=(4, 3), batch=-1, threads=1, rounds=1, calls=1)
    with pytest.raises(NotHereError, match=r"rank 0 failed: .*negative dimension"):
        time_on_ranks(settings)


def test_memory_of_a_device_that_does_not_tell_is_not_here(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    with pytest.raises(NotHereError, match="mps"):
        peak_bytes(int, torch.device("mps"))


# What is compared


def test_the_peak_counts_what_is_alive_at_once():
    def twice():
        first = torch.empty(1000)
        del first
        torch.empty(2000)

    def together():
        first, second = torch.empty(1000), torch.empty(2000)
        return first, second

    assert peak_bytes(twice, CPU) == 8000
    assert peak_bytes(together, CPU) == 12000


def test_a_step_that_is_timed_does_what_training_does():
    network = mlp((6, 5, 3), 4, CPU)
    step = Steps(network)
    before = [p.detach().clone() for p in network.model.parameters()]
    step.ste()
    ste = [weight.param.grad.clone() for weight in network.weights]
    estimator = fogzo.FogzoEstimator(network.weights, one_sided=True, noise_share=0.5)
    step.refined(estimator)
    assert estimator.step == 1
    for grad, weight in zip(ste, network.weights, strict=True):
        assert not torch.equal(grad, weight.param.grad)
    for was, param in zip(before, network.model.parameters(), strict=True):
        torch.testing.assert_close(param.detach(), was, rtol=1e-5, atol=1e-6)


def test_the_chain_of_torch_operations_is_the_same_quantizer():
    plain = nn.Linear(12, 7)
    chain = Chain(copy.deepcopy(plain))
    quantized = LAYERS["fogzo.lsq(2)"](copy.deepcopy(plain))
    quantized.load_state_dict({"weight_step": torch.tensor([[0.07]])}, strict=False)
    with torch.no_grad():
        chain.step.fill_(0.07)
    x = torch.randn(5, 12)
    torch.testing.assert_close(chain(x), quantized(x))
    for layer in (chain, quantized):
        layer(x).square().sum().backward()
    torch.testing.assert_close(chain.layer.weight.grad, quantized.weight.grad)


# The baseline that edits weights in place


def scalar_weight(law):
    param = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
    surrogate = replace(identity(), perturbation=law)
    step = torch.tensor(0.5, dtype=torch.float64)
    return fogzo.QuantizedWeight("w", param, lambda: step, surrogate)


def test_mezo_and_spsa_agree_where_the_noise_leaves_no_choice():
    # With u = ±1 and one weight, (L+ - L-) u / 2 eps is the same for both signs.
    weight = scalar_weight(with_radius(Rademacher(), 0.2))

    def loss():
        return weight.param.pow(3).sum()

    fogzo.SpsaEstimator([weight], num_samples=3).refine_grads_(loss)
    expected = weight.param.grad.clone()
    with torch.random.fork_rng():
        mezo.write_gradients_([weight], loss, num_samples=3, draw=mezo.own_law)
    torch.testing.assert_close(weight.param.grad, expected, rtol=1e-9, atol=0)
    # 3 w^2 + eps^2, with w = 0.3 and eps = 0.5 * 0.2.
    assert expected.item() == pytest.approx(0.28, rel=1e-6)


@pytest.mark.parametrize("draw", [mezo.normal, mezo.own_law])
def test_mezo_has_the_right_mean_on_a_linear_loss(draw):
    slope = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    param = nn.Parameter(torch.zeros_like(slope))
    step = torch.tensor([[0.1], [0.4]])
    weight = fogzo.QuantizedWeight("w", param, lambda: step)
    samples = 300
    with torch.random.fork_rng():
        mezo.write_gradients_(
            [weight], lambda: (slope * param).sum(), num_samples=samples, draw=draw
        )
    # In units of each weight's step the variance of an entry is about |D|^2.
    scaled = (param.grad - slope) * step
    assert scaled.abs().max() < 5 * (slope * step).norm() / math.sqrt(samples)


def test_mezo_leaves_round_off_in_the_weights_and_the_estimator_none():
    network = mlp((20, 8, 3), 4, CPU)
    weights = network.weights
    before = [weight.param.detach().clone() for weight in weights]
    estimator = fogzo.SpsaEstimator(weights)
    for _ in range(100):
        estimator.refine_grads_(network.loss)
    assert all(torch.equal(w.param, was) for w, was in zip(weights, before, strict=True))
    with torch.random.fork_rng():
        for step in range(100):
            mezo.write_gradients_(weights, network.loss, seed=step)
    for weight, was in zip(weights, before, strict=True):
        assert not torch.equal(weight.param, was)
        torch.testing.assert_close(weight.param.detach(), was, rtol=0, atol=1e-5)


# The outputs


def test_there_is_a_table_per_section_of_few_columns(results):
    shown = tables(results)
    assert len(shown) == len(SECTION_NAMES)
    for table, name in zip(shown, SECTION_NAMES, strict=True):
        assert len(table.rows) == len(cases_of(results, name))
        assert all(len(row) == len(table.heading) for row in table.rows)
        assert len(table.heading) <= 6
    assert [t.heading[-1] for t in shown].count("skipped") == 1


def test_a_column_is_shown_where_something_is_in_it():
    case = {"name": "net", "skipped": None, "seconds": {}, "ratios": {}}
    facts = {"quantized_weights": 10, "ste_peak_bytes": 40, "default_copies": 1.0}
    for more in ({}, {"redrawn_copies": 1.1}):  # which earlier versions measured
        section = {"cases": [case | {"facts": facts | more}]}
        (table,) = tables({"sections": {"memory": section}})
        assert ("noise drawn twice" in table.heading) == bool(more)


def test_a_section_without_a_case_has_no_table(tmp_path, capsys, monkeypatch):
    nothing = {"sections": {"compiled": {"seconds": 0.0, "cases": []}}}
    monkeypatch.setattr("fogzo_lab.cli.bench.run_suite", lambda *_: nothing)
    main(["bench", "--device", "cpu", "--output-dir", str(tmp_path)])
    assert capsys.readouterr().out.startswith("results: ")


def test_layers_stand_beside_their_peers_in_a_row_per_layer(results):
    table = peers_table(results)
    assert len(table.rows) == len(layers.SHAPES["tiny"])
    (cells, _) = (dict(zip(table.heading, row, strict=True)) for row in table.rows)
    assert cells["layer"] == "Linear 8 x 8, batch 4, eager"
    case = next(
        case
        for case in cases_of(results, "layers")
        if case["name"] == "Linear 8 x 8, batch 4, eager: fogzo.lsq(2)"
    )
    assert cells["fogzo.lsq(2)"].startswith(f"{case['ratios']['over base']['median']:.2f} [")
    assert cells["brevitas, 2 bits"] == "–"
    assert "torchao is not installed; brevitas is not installed" in table.caption


def test_the_same_numbers_give_the_same_plot(results, tmp_path):
    for name in ("a.svg", "b.svg"):
        plot(results, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for name in (*SECTION_NAMES, "FOGZO step / STE step", "fogzo.lsq(2)"):
        assert f">{name}</text>" in text


def test_a_plot_needs_no_section_to_have_worked(results, tmp_path):
    broken = copy.deepcopy(results)
    for case in itertools.chain(*(cases_of(broken, name) for name in SECTION_NAMES)):
        case["skipped"] = "no such device"
    plot(broken, tmp_path / "a.svg")
    assert "nothing could be measured" in (tmp_path / "a.svg").read_text()


def test_the_command_writes_its_files_and_prints_its_tables(tmp_path, capsys):
    only = ("--only", "steps", "layers", "--rounds", "1", "--device", "cpu")
    main(["bench", "--suite", "tiny", "--output-dir", str(tmp_path / "bench"), *only])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "overhead" in printed
    assert "torchao is not installed" in printed
    found = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert list(found["sections"]) == ["steps", "layers"]
    assert {case["rounds"] for case in cases_of(found, "steps")} == {1}
    assert (tmp_path / "bench" / "bench.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--only", "stepps"), "got 'stepps': --only steps"),
        (("--only", "gpu"), "only must be one of steps, memory, layers, compiled, probes, scaling"),
        (("--rounds", "0"), "rounds must be 1 or more"),
        (("--threads", "0"), "threads must be 1 or more"),
        (("--seconds", "-1"), "seconds must be positive"),
        (("--seconds", "nan"), "seconds must be finite"),
        (("--device", "cuda:99"), "--device cpu"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments, "--output-dir", str(tmp_path / "bench")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("fogzo: ")
    assert said.count("\n") == 1
    assert says in said
    assert not (tmp_path / "bench").exists()


def test_help_says_what_there_is(capsys):
    main(["--help"])
    assert "bench" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    assert "--suite" in capsys.readouterr().out


def test_sections_run_once_and_in_their_order():
    assert BenchConfig(only=("probes", "steps", "probes")).sections == ("steps", "probes")
    assert BenchConfig().sections == SECTION_NAMES
    assert asdict(BenchConfig(suite="quick", rounds=5).limits)["rounds"] == 5
