"""torchao's PARQ, as docs/methods.md uses it."""

import pytest
import torch

parq = pytest.importorskip("torchao.prototype.parq.optim.parq", exc_type=ImportError)


@pytest.mark.parametrize(
    ("softness", "expected"),
    [
        (1.0, [-1.5, -1.2, 0.3, 0.5, 1.5]),  # the range cuts, nothing else
        (0.5, [-1.5, -1.4, 0.5, 0.5, 1.5]),
        (1e-9, [-1.5, -1.5, 0.5, 0.5, 1.5]),  # the nearest level
    ],
)
def test_weights_are_drawn_to_the_grid_as_published(monkeypatch, softness, expected):
    monkeypatch.setattr(parq, "normalized_mirror_sigmoid", lambda *_: softness)
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    weights = torch.tensor([-2.0, -1.2, 0.3, 0.5, 9.0])
    parq.ProxPARQ(0, 100).apply_(weights, None, levels, 50)
    assert weights.tolist() == pytest.approx(expected)
