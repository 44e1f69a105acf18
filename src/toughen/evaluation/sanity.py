"""What results show when robustness may be an artefact: a weaker attack that does better than a stronger one.

Knows outcomes only; what the model itself shows is in ``masking``.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toughen.evaluation.outcomes import EvalResult, Flag
from toughen.statistics import compare_paired

ONE_STEP = "one-step-beats-many"  # the name of a check that can be made on the model, too
BLACK_BOX_BETTER = "black-box-beats-white-box"
ADVICE = "attacks with the gradient fail for want of a useful one: their accuracy is an artefact"
P_VALUE = 0.02  # two-sided: an honest model is flagged in at most 1 of 100 comparisons
POINTS = 0.002  # share of the samples that makes a difference worth a flag; AutoAttack's own, for Square
BLACK_BOX = "square"  # of the attacks that use no gradient, the one with an eps; Pixle may change pixels at will


def check_results(results: Mapping[str, EvalResult]) -> tuple[Flag, ...]:
    """Compare the results of one evaluation with each other.

    More steps, or a larger eps, must not help the model where the settings are the same otherwise; one step must not
    beat many; Square must not beat attacks that see the gradient, alone or after them in a suite. One attack is better
    than another where it is by more than 0.2 points and by more than chance: a one-sided sign test at 1 % on the
    samples that only one of the two broke. In a suite it is more than 0.2 points, and more than one sample.

    Args:
        results: By name, on the same samples; results on another number of samples are not compared.

    Returns:
        One flag for each result that is contradicted, by the strongest of those that do.
    """
    return (
        *_weaker_setting_is_stronger(results, "steps", "more-steps-help"),
        *_weaker_setting_is_stronger(results, "eps", "larger-eps-helps"),
        *_one_step_beats_many(results),
        *_black_box_breaks_the_rest(results),
        *_black_box_beats_white_box(results),
    )


def check_transfer(names: Sequence[str], accuracy: Sequence[Sequence[float]], n: int) -> tuple[Flag, ...]:
    """Compare attacks made on other models with those made on the victim itself.

    Transfer beats white-box where its accuracy is lower by more than chance: by 0.2 points, by the seven samples that
    a sign test at 1 % needs at least, and by 2.33 standard errors of the difference of two independent shares. (They
    are shares of the same samples, which differ less.)

    Args:
        names: Of the models.
        accuracy: Under the attack made on model i, of model j: ``accuracy[i][j]``, in [0, 1].
        n: Samples behind each number, at least 1.

    Returns:
        At most one flag for each victim, for the model whose attack hurts it most.
    """
    flags = []
    for victim, name in enumerate(names):
        white = accuracy[victim][victim]
        worst = min(range(len(names)), key=lambda attacker: accuracy[attacker][victim])
        transfer = accuracy[worst][victim]
        pooled = (white + transfer) / 2
        margin = max(POINTS, 7 / n, 2.33 * math.sqrt(2 * pooled * (1 - pooled) / n))
        if white - transfer >= margin:
            flags.append(
                Flag(
                    "transfer-beats-white-box",
                    f"{name} keeps {transfer:.1%} under the attack made on {names[worst]}, {white:.1%} under its own "
                    f"(n = {n}, chance explains {margin:.1%})",
                    f"the attack on {name} fails for want of a useful gradient: its own accuracy is an artefact",
                )
            )
    return tuple(flags)


def beyond_chance(stronger: Sequence[bool], weaker: Sequence[bool]) -> bool:
    """Whether fewer samples stand under the first attack than under the second, by more than 0.2 points and chance.

    Chance is the exact McNemar test: it speaks of the samples, given in the same order, that only one of them broke.
    """
    found = compare_paired(weaker, stronger)
    return found.difference > POINTS and found.p_value <= P_VALUE


def _weaker_setting_is_stronger(results: Mapping[str, EvalResult], setting: str, check: str) -> Iterator[Flag]:
    """Compare results that are alike but for one setting."""
    # a strength curve over eps may scale the steps along
    varied = ("eps", "step_size") if setting == "eps" else (setting,)
    families: dict[object, list[tuple[float, str]]] = {}
    for name, result in results.items():
        settings = _flat(_own_settings(result))
        values = {value for path, value in settings.items() if path[-1] == setting}
        if len(values) == 1:
            rest = frozenset((path, repr(value)) for path, value in settings.items() if path[-1] not in varied)
            kind = re.sub("[^a-z]+", " ", result.attack)
            families.setdefault((kind, result.n, rest), []).append((values.pop(), name))
    for members in families.values():
        for value, name in members:
            weaker = [other for less, other in members if less < value]
            if better := _better(results, weaker, name):
                yield Flag(
                    check,
                    f"{_standing(results, name)}, but {_standing(results, better)}",
                    "the attack does not climb: its gradient is masked, or its steps are too long or too short",
                )


def _one_step_beats_many(results: Mapping[str, EvalResult]) -> Iterator[Flag]:
    for name, result in results.items():
        one = [other for other, weak in results.items() if weak.attack == "fgsm" and _alike(weak, result)]
        if result.attack.startswith("pgd-") and (better := _better(results, one, name)):
            yield Flag(
                ONE_STEP,
                f"{_standing(results, name)}, but {_standing(results, better)}",
                "the gradient does not lead uphill: use an attack without gradients, or through a smooth stand-in",
            )


def _black_box_breaks_the_rest(results: Mapping[str, EvalResult]) -> Iterator[Flag]:
    for name, result in results.items():
        white_box = False
        for stage in result.stages:
            if not _is_black_box(stage.name):
                white_box = True
            elif white_box and stage.fell > max(1, POINTS * result.n):
                yield Flag(
                    BLACK_BOX_BETTER,
                    f"in {name}, {stage.name} broke {stage.fell} of the {stage.attacked} samples that attacks with the "
                    f"gradient had left ({stage.fell / result.n:.1%} of all, allowed {POINTS:.1%})",
                    ADVICE,
                )


def _black_box_beats_white_box(results: Mapping[str, EvalResult]) -> Iterator[Flag]:
    for name, result in results.items():
        if not _is_black_box(result.attack):
            continue
        white_box = [
            other
            for other, rival in results.items()
            # thousands of queries may honestly beat a single step; a suite may hold the very black box
            if _alike(rival, result)
            and rival.attack.partition(":")[0] != "fgsm"
            and not any(_is_black_box(s.name) for s in rival.stages)
        ]
        if white_box:
            strongest = min(white_box, key=lambda other: results[other].accuracy)
            if beyond_chance(result.correct, results[strongest].correct):
                yield Flag(BLACK_BOX_BETTER, f"{_standing(results, strongest)}, but {_standing(results, name)}", ADVICE)


def _better(results: Mapping[str, EvalResult], weaker: Sequence[str], name: str) -> str | None:
    """The strongest of the attacks meant to be weaker than the named one, where it does better than that."""
    strongest = min(weaker, key=lambda other: results[other].accuracy, default=None)
    if strongest is None or not beyond_chance(results[strongest].correct, results[name].correct):
        return None
    return strongest


def _standing(results: Mapping[str, EvalResult], name: str) -> str:
    result = results[name]
    return f"{result.accuracy:.1%} of {result.n} samples stand under {name}"


def _is_black_box(name: str) -> bool:
    return name.partition("-")[0].partition(":")[0] == BLACK_BOX


def _alike(a: EvalResult, b: EvalResult) -> bool:
    """Whether two results are of the same threat model, on as many samples."""
    return a.n == b.n and _threat(a) == _threat(b) != set()


def _threat(result: EvalResult) -> set[tuple[str, str]]:
    settings = _flat(_own_settings(result))
    return {(path[-1], repr(value)) for path, value in settings.items() if path[-1] in ("norm", "eps")}


def _own_settings(result: EvalResult) -> Mapping[str, Any]:
    """Of a plain attack without its name around them, which may hold the number of steps; of a suite by stage."""
    inner = result.settings.get(result.attack, result.settings)
    return inner if isinstance(inner, Mapping) else result.settings


def _flat(settings: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Plain values by their path."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in settings.items():
        inner = _flat(value) if isinstance(value, Mapping) else {(): value}
        leaves |= {(key, *path): leaf for path, leaf in inner.items()}
    return leaves
