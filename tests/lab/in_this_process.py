"""Comparisons without worker processes, each of which would take seconds to import torch."""

import contextlib

from fogzo_lab.comparison import compare as module
from fogzo_lab.comparison.timing import run_seconds


class InThisProcess(contextlib.nullcontext):
    """An executor that computes calls where it stands.

    Args:
        shares_files: Whether runs are to be written where the comparison looks for them.
    """

    def __init__(self, shares_files=True):
        super().__init__(self)
        self.shares_files = shares_files

    def results(self, calls):
        for call in calls:
            yield call.function(*call.arguments)


def compare_in_this_process(patch, shares_files=True):
    """Have comparisons compute their runs here, and time them briefly, while a patch lasts."""
    patch.setattr(module, "start_executor", lambda *_: InThisProcess(shares_files))
    patch.setattr(module, "measure_seconds", lambda configs, *_: run_seconds(configs, 3, 1))
