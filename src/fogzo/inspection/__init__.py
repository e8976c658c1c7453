"""A doctor for quantized networks: what is wrong with which layer, by which number."""

from fogzo.inspection.findings import THRESHOLDS, agreement_note, diagnose
from fogzo.inspection.records import Finding, InFloat, Inspection, LayerInspection
from fogzo.inspection.snapshot import inspect
from fogzo.inspection.watch import Watch

__all__ = [
    "THRESHOLDS",
    "Finding",
    "InFloat",
    "Inspection",
    "LayerInspection",
    "Watch",
    "agreement_note",
    "diagnose",
    "inspect",
]
