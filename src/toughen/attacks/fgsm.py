"""The single random-start step of Fast-AT (Wong et al. 2020), which is PGD with one long step."""

from toughen.attacks.pgd import PGD, ModelMode
from toughen.types import ThreatModel


def fgsm_rs(
    threat: ThreatModel,
    *,
    step_size: float | None = None,
    random_start: bool = True,
    model_mode: ModelMode = "eval",
) -> PGD:
    """Return FGSM-RS: a uniform start, one step of 1.25 eps, back into the ball.

    Args:
        threat: The allowed perturbations.
        step_size: Length of the step in pixel units; None is 1.25 eps, as published.
        random_start: Without it and with ``step_size = eps`` this is the original FGSM.
        model_mode: As for ``PGD``.

    Returns:
        The attack, usable wherever an attack is.
    """
    return PGD(
        threat,
        step_size=1.25 * threat.eps if step_size is None else step_size,
        steps=1,
        random_start=random_start,
        model_mode=model_mode,
    )
