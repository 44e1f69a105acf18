"""How far to trust an accuracy, a difference of two, and a mean over seeds. Knows numbers only, no torch.

Three sources of chance, and which function speaks of which:

- *the test images*: another draw of them would give another accuracy. ``wilson_interval`` for one network,
  ``compare_paired`` for two networks on the same images. Both hold the networks fixed.
- *training*: another seed would give another network. ``over_seeds`` for one method, ``compare_seeds`` for two methods
  that were trained with the same seeds. Both hold the test images fixed.
- *the choice of what to report*: none of them. Of twenty differences that are nothing, one has p < 0.05.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import optimize, stats

from toughen.errors import InputError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """From ``low`` to ``high``, both included."""

    low: float
    high: float

    def reach(self, centre: float) -> float:
        """Return the distance from a centre to the farther end."""
        return max(self.high - centre, centre - self.low)


@dataclass(frozen=True)
class PairedDifference:
    """How two networks differ on the same images.

    Attributes:
        difference: Accuracy of the first minus that of the second, in [-1, 1].
        interval: Of the difference.
        p_value: Of the exact McNemar test that both are equally accurate.
        only_first: Images that only the first network gets right.
        only_second: Images that only the second network gets right.
        n: All images.
    """

    difference: float
    interval: Interval
    p_value: float
    only_first: int
    only_second: int
    n: int


@dataclass(frozen=True)
class SeedSummary:
    """What came out over seeds.

    Attributes:
        values: One for each seed.
        mean: Their mean.
        sd: Their sample standard deviation (divisor n - 1); None for one seed.
        least: The smallest.
        most: The largest.
        interval: Of the mean, by Student's t; None for one seed, and where all values are equal (that no spread was
            seen does not show that there is none).
    """

    values: tuple[float, ...]
    mean: float
    sd: float | None
    least: float
    most: float
    interval: Interval | None


def wilson_interval(num_correct: int, n: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's score interval of an accuracy.

    Right for one network on ``n`` test images drawn at random from those that it will meet. It says nothing about
    another training run, and two such intervals that overlap do not show that two networks are alike: compare them
    with ``compare_paired``. Never empty and never outside [0, 1], even where all images or none are right.

    Args:
        num_correct: Images that the network gets right, 0 to ``n``.
        n: Images, at least 1.
        confidence: In (0, 1).

    Raises:
        InputError: Counts or confidence out of range.
    """
    _check_confidence(confidence)
    if not 0 <= num_correct <= n or n < 1:
        raise InputError(f"an accuracy needs 0 <= num_correct <= n and n >= 1, got {num_correct} of {n}")
    found = stats.binomtest(num_correct, n).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def compare_paired(
    first: Sequence[bool], second: Sequence[bool], *, confidence: float = CONFIDENCE
) -> PairedDifference:
    """Compare two networks on the same images, in the same order.

    Right for the question whether *these two networks* differ on images like these. Whether the methods that made them
    differ is another question, which needs several seeds: see ``compare_seeds``. Images on which both are right or both
    are wrong cancel, so the interval is much narrower than two independent samples would give.

    The interval is Tango's score interval for paired proportions (Statistics in Medicine 17, 1998, 891-908); the test
    is McNemar's in its exact, binomial form. The exact test is the more cautious: its p can be just above 1 -
    ``confidence`` where the interval just leaves 0 out.

    Args:
        first: Outcome of each image, true where the network is right.
        second: The same of the other network.
        confidence: In (0, 1).

    Raises:
        InputError: No images, unlike numbers of them, or confidence out of range.
    """
    _check_confidence(confidence)
    n = len(first)
    if n < 1 or len(second) != n:
        raise InputError(f"a paired comparison needs two outcomes for each image, got {n} and {len(second)}")
    only_first = sum(bool(a and not b) for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b and not a) for a, b in zip(first, second, strict=True))
    disagreements = only_first + only_second
    return PairedDifference(
        difference=(only_first - only_second) / n,
        interval=_tango(only_first, only_second, n, confidence),
        p_value=float(stats.binomtest(only_first, disagreements).pvalue) if disagreements else 1.0,
        only_first=only_first,
        only_second=only_second,
        n=n,
    )


def over_seeds(values: Sequence[float], *, confidence: float = CONFIDENCE) -> SeedSummary:
    """Summarise one method's results over seeds.

    Right for the question what *another training run* of the method would give on these test images: the standard
    deviation and the extremes are the spread of single runs, the interval is of their mean. It takes the results as
    draws from a normal distribution, which three seeds cannot confirm: with few seeds it is wide for a reason.

    Args:
        values: One for each seed, at least one.
        confidence: In (0, 1).

    Raises:
        InputError: No value, or confidence out of range.
    """
    _check_confidence(confidence)
    n = len(values)
    if n < 1:
        raise InputError("a summary over seeds needs at least one value")
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    interval = None
    # differences of equal accuracies differ by rounding
    if sd is not None and not math.isclose(min(values), max(values), abs_tol=1e-12):
        reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
        interval = Interval(mean - reach, mean + reach)
    return SeedSummary(tuple(values), mean, sd, min(values), max(values), interval)


def compare_seeds(
    first: Mapping[int, float], second: Mapping[int, float], *, confidence: float = CONFIDENCE
) -> SeedSummary:
    """Summarise the differences of two methods that were trained with the same seeds.

    Right for the question whether *the methods* differ, where a seed fixes what both have in common (initial weights,
    order of the images, the checkpoint that both continue): that part cancels. The interval is that of the paired
    t-test; without 0 in it, the difference is significant at 1 - ``confidence``.

    Args:
        first: Result by seed; seeds that the other method lacks are left out.
        second: The same of the other method.
        confidence: In (0, 1).

    Raises:
        InputError: No seed in common, or confidence out of range.
    """
    common = [seed for seed in first if seed in second]
    if not common:
        raise InputError(f"no seed in common: {sorted(first)} and {sorted(second)}; train both with the same seeds")
    return over_seeds([first[seed] - second[seed] for seed in common], confidence=confidence)


def _tango(only_first: int, only_second: int, n: int, confidence: float) -> Interval:
    """Every difference that the score test would not reject; the statistic falls as the difference grows."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    estimate = (only_first - only_second) / n

    def score(difference: float) -> float:
        # maximum likelihood of "only second is right" under this difference, the larger root of a quadratic
        slope = (2 * n - only_first + only_second) * difference - only_first - only_second
        root = math.sqrt(max(slope**2 + 8 * n * only_second * difference * (1 - difference), 0.0))
        share = (root - slope) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        excess = only_first - only_second - n * difference
        if excess == 0:
            return 0.0
        return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess)

    def bound(end: float, wanted: float) -> float:
        if estimate == end:
            return end
        return float(optimize.brentq(lambda difference: score(difference) - wanted, *sorted((estimate, end))))

    return Interval(bound(-1.0, z), bound(1.0, -z))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence:g}; 0.95 is usual")
