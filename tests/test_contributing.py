"""What CONTRIBUTING says of the code is true."""

import re
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fogzo

ROOT = Path(__file__).parents[1]
LIBRARY = Path(fogzo.__file__).parent  # not any folder of its name: a checkout has it, too
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def section(title):
    return TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def called_by_a_refinement():
    """(file, qualified name) of the library's functions, in the order of their calls."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    fogzo.quantize_(model, fogzo.lsq(2), lambda module, name: True)
    estimator = fogzo.FogzoEstimator(fogzo.quantized_weights(model), noise_share=0.3)
    x, y = torch.randn(16, 32), torch.randint(4, (16,))
    calls, inside = [], []

    def closure():
        inside.append(True)
        try:
            return cross_entropy(model(x), y)
        finally:
            inside.pop()

    def profile(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(LIBRARY) and not inside:
            calls.append((path.relative_to(LIBRARY).as_posix(), frame.f_code.co_qualname))

    for step in range(2):  # the first one checks more
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        if step:
            sys.setprofile(profile)
        try:
            stats = estimator.refine_grads_(closure, expected_loss=loss)
        finally:
            sys.setprofile(None)
    assert stats.fallback is None
    return calls


def test_a_perturbation_walks_as_told():
    calls = called_by_a_refinement()
    position, told = 0, 0
    for item in re.findall(
        r"^\d+\. (.*?)(?=^\d+\. |\Z)", section("The walk of one perturbation"), re.M | re.S
    ):
        path, *names = re.findall(r"`([^`]+)`", item)
        for name in names:
            matching = [
                i
                for i, (place, called) in enumerate(calls[position:], position)
                if place == path and called in (name, f"GradientEstimator.{name}")
            ]
            assert matching, f"{path}: {name} is not called where CONTRIBUTING says so"
            position, told = matching[0], told + 1
    assert told == 18


def test_the_walk_counts_what_runs():
    calls = [call for call in called_by_a_refinement() if not call[1].startswith("<")]
    functions, files = re.search(r"\((\d+)\s+functions in (\d+) files\)", TEXT).groups()
    named = {call for call in calls if "<" not in call[1].rpartition(".")[2]}
    assert abs(len(named) - int(functions)) <= 4  # a warning or an uneven weight more or less
    assert abs(len({place for place, _ in named}) - int(files)) <= 1


def test_the_first_questions_are_answered_by_files_that_exist():
    links = re.findall(r"\]\(([^)]+)\)", section("A newcomer's first five questions"))
    assert len(links) == 6
    assert all((ROOT / link).is_file() for link in links)


def test_messages_send_readers_to_caveats_that_exist():
    page = (ROOT / "docs" / "caveats.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (.*)$", page, re.M))
    code = "".join(path.read_text("utf-8") for path in (ROOT / "src/fogzo").rglob("*.py"))
    linked = set(re.findall(r"""\bcaveat\(["'](.*?)["']\)""", code))
    assert linked <= sections
    # What nobody can be told of when it happens, or is told of by the code in another way.
    assert sections - linked == {
        "Autocast",
        "Batch norm",
        "Checkpoints",
        "Compiled models",
        "Dropout",
        "Encoders in eval mode",
        "Losses with derivatives",
        "Threads",
        "Tied weights",
    }
