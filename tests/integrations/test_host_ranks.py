"""Two ranks under accelerate, transformers' Trainer and Lightning are one process."""

from pathlib import Path

import pytest
import torch

from toolbox import run_ranks

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("lightning", reason="lightning is not installed")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    import host_ranks

    ranks = run_ranks(str(HERE / "host_ranks.py"), tmp_path_factory.mktemp("ranks"))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return host_ranks.results(tmp_path_factory.mktemp("one")), ranks


@pytest.mark.parametrize("host", ["accelerate", "trainer", "lightning", "lightning, FSDP2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_equal_one_process(runs, host, accumulation):
    one, ranks = runs
    params, agreements = one[host, accumulation]
    assert len(agreements) == 3
    for rank in ranks:
        for ours, theirs in zip(params, rank[host, accumulation][0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert rank[host, accumulation][1] == pytest.approx(agreements, rel=1e-3)
    first, second = (rank[host, accumulation] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
