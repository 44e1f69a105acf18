"""Evaluation of any model: clean and attacked accuracy, per sample."""

from toughen.evaluation.evaluate import Attacked, Progress, evaluate
from toughen.evaluation.examples import keep_examples
from toughen.evaluation.journal import Journal, facts_of
from toughen.evaluation.masking import check_model
from toughen.evaluation.outcomes import EvalResult, Flag, Stage
from toughen.evaluation.sanity import check_results, check_transfer
from toughen.evaluation.suites import EvalAttack, Search, attack_names, parse_attack
from toughen.evaluation.transfer import TransferMatrix, transfer, transfer_from

__all__ = [
    "Attacked",
    "EvalAttack",
    "EvalResult",
    "Flag",
    "Journal",
    "Progress",
    "Search",
    "Stage",
    "TransferMatrix",
    "attack_names",
    "check_model",
    "check_results",
    "check_transfer",
    "evaluate",
    "facts_of",
    "keep_examples",
    "parse_attack",
    "transfer",
    "transfer_from",
]
