"""The attacks of an evaluation, by name: ``clean``, ``fgsm``, ``pgd-K`` for any K."""

import re
from dataclasses import dataclass

from toughen.attacks import PGD, Attack, fgsm_rs
from toughen.errors import unknown
from toughen.types import ThreatModel


@dataclass(frozen=True)
class EvalAttack:
    """A named attack of an evaluation; ``attack`` None leaves the images clean."""

    name: str
    attack: Attack | None


def attack_names() -> tuple[str, ...]:
    """Return the names that ``parse_attack`` takes; any number may stand behind ``pgd-``."""
    return ("clean", "fgsm", "pgd-10", "pgd-20", "pgd-50", "pgd-100")


def parse_attack(name: str, *, threat: ThreatModel, step_size: float) -> EvalAttack:
    """Make the attack of this name.

    Args:
        name: ``"clean"``, ``"fgsm"`` (one step of eps from the image itself), or ``"pgd-K"``: K steps of ``step_size``
            by cross-entropy from a random start, the last iterate counts.
        threat: What the attack may do.
        step_size: Of PGD, in pixel units.

    Raises:
        InputError: Unknown name.
    """
    if name == "clean":
        return EvalAttack(name, None)
    if name == "fgsm":
        return EvalAttack(name, fgsm_rs(threat, step_size=threat.eps, random_start=False))
    if match := re.fullmatch(r"pgd-([1-9]\d{0,4})", name):
        return EvalAttack(name, PGD(threat, step_size=step_size, steps=int(match[1])))
    raise unknown("attack", name, attack_names(), hint="any K in pgd-K, at least 1")
