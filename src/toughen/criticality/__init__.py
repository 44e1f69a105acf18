"""How much each layer amplifies an adversarial perturbation, and which layers to choose for it."""

from toughen.criticality import selection
from toughen.criticality.analyze import CriticalityOptions, Measure, analyze
from toughen.criticality.index import CriticalityReport, LayerCriticality
from toughen.criticality.weakness import WeaknessNorm, WeaknessSums, weakness

__all__ = [
    "CriticalityOptions",
    "CriticalityReport",
    "LayerCriticality",
    "Measure",
    "WeaknessNorm",
    "WeaknessSums",
    "analyze",
    "selection",
    "weakness",
]
