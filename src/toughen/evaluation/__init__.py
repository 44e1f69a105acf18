"""Evaluation of any model: clean and attacked accuracy, per sample."""

from toughen.evaluation.evaluate import EvalResult, evaluate
from toughen.evaluation.store import store
from toughen.evaluation.suites import EvalAttack, attack_names, parse_attack

__all__ = ["EvalAttack", "EvalResult", "attack_names", "evaluate", "parse_attack", "store"]
