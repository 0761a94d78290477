"""Eligibility gates: what may be asked at all, before anything is scored."""

from fedinfer_flower.selection.gates.base import (
    GATES,
    Admission,
    Gate,
    Stage,
    apply_gates,
    make_gate,
)

__all__ = ["GATES", "Admission", "Gate", "Stage", "apply_gates", "make_gate"]
