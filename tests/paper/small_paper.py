"""A paper of a few rows about the two smallest networks, and a scale at which they train in a second."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from toughen.paper import SCALES, Scale, values

ROWS: dict[str, list[dict[str, Any]]] = {
    "1": [
        {"method": "PGD-AT", "values": {"clean": 80.05, "pgd10": 58.15}, "another": {"pgd10": "PGD-20"}},
        {"method": "PGD-AT+CLAT", "values": {"clean": 81.03, "pgd10": None}, "doubtful": ["pgd10"], "note": "blurred"},
        {"method": "Bai2024+CLAT", "values": {"clean": 92.11}},
    ],
    "2": [{"method": "PGD-AT+CLAT", "values": {"autoattack": 42.86}}],
    "3": [
        {
            "method": "PGD-AT+CLAT",
            "model": "PreAct-RN18",
            "attacker": "RN18",
            "values": {"blackbox_autoattack": 48.92, "blackbox_pgd": 70.12},
        }
    ],
    "4": [
        {"method": "criticality selection", "batch_size": 10, "values": {"critical_layers_top5": [11], "time_s": 2.64}},
        {"method": "PGD-AT", "values": {"epoch_time_s": 67}},
        {"method": "PGD-AT+CLAT", "values": {"critical_layers_top5": None, "trainable_share": None}},
        {"method": "PGD-AT+CLAT", "epoch": 80, "values": {"critical_layers": [11]}},
    ],
    "5": [
        {"method": "PGD-AT", "attack": "PGD-Linf eps=0.03 50 steps", "values": {"adversarial": 57.01}},
        {"method": "PGD-AT+CLAT", "attack": "PGD-Linf eps=0.03 50 steps", "values": {"adversarial_delta": 1.92}},
    ],
    "6": [{"method": "PGD-AT", "values": {"clean": 57.01}}],
}


def scale() -> Scale:
    """A scale of ten epochs, of which each is one step on 50 digits."""
    small = SCALES["digits"]
    assert small.data is not None
    data = {**small.data, "train_samples": 50, "validation": 20, "test_samples": 20}
    return replace(small, samples=8, data=data, widths={"resnet18": 2, "preact_resnet18": 2}, steps=3, queries=5)


def put_in_place(
    patch: pytest.MonkeyPatch, rows: Mapping[str, list[dict[str, Any]]] = ROWS, at: Scale | None = None
) -> None:
    """Let the package reproduce this paper at this scale."""
    tables = {
        number: {"title": f"about {number}", "rows": [{"dataset": "CIFAR-10", "model": "RN18", **row} for row in found]}
        for number, found in rows.items()
    }
    patch.setattr(values, "_tables", lambda: tables)
    patch.setitem(SCALES, (at or scale()).name, at or scale())
