"""The comparison of runs as tables: what each reached on test images and at what cost, and how they differ."""

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from toughen.errors import one_line
from toughen.report.comparison import Comparison, Contrast, Difference
from toughen.report.rows import Row
from toughen.statistics import CONFIDENCE, Interval

PERCENT = round(100 * CONFIDENCE)


def comparison_tables(comparison: Comparison) -> Group:
    """Return the table of accuracies and, where there are any to tell, that of the differences."""
    tables = [accuracy_table(comparison)]
    if comparison.differences:
        tables.append(difference_table(comparison))
    return Group(*tables)


def accuracy_table(comparison: Comparison) -> Table:
    """Put the rows below one another: the last and the best checkpoint of each, and what its own epochs cost.

    "Best" is the epoch with the highest robust validation accuracy; test images choose nothing.
    """
    title = f"accuracy on {_images(comparison)}, percent: last epoch (best on validation)"
    table = _table(title, _accuracy_caption(comparison))
    table.add_column("method", min_width=9)
    for column in ("epochs", *_headings(comparison), "trained", "s/epoch", "FLOPs"):
        table.add_column(_shown(column), justify="right")
    for row in comparison.rows:
        accuracies = [_accuracy(row, attack) for attack in comparison.attacks]
        costs = f"{100 * row.trained:.1f} %", f"{row.seconds:.2f}", f"{row.flops:.2f}"
        table.add_row(*map(_shown, (_title(row), row.method, _epochs(row), *accuracies, *costs)))
    return table


def difference_table(comparison: Comparison) -> Table:
    """Say how rows differ from what they are naturally compared with, at the last epoch."""
    title = f"differences on the same {_images(comparison)}, points of accuracy, last epoch"
    table = _table(title, _difference_caption(comparison))
    table.add_column("against", no_wrap=True)
    table.add_column("paired by")
    for column in _headings(comparison):
        table.add_column(_shown(column), justify="right")
    for difference in comparison.differences:
        cells = [_contrast(difference.attacks.get(attack)) for attack in comparison.attacks]
        names = difference.row.name, difference.against.name
        table.add_row(*map(_shown, (*names, _pairing(difference), *cells)))
    return table


def _table(title: str, caption: str) -> Table:
    table = Table(title=title, caption=_shown(caption), caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    return table


def _shown(text: str) -> str:
    """Return a cell that shows a text as it is: names of a run folder may hold markup and escape sequences."""
    return escape(one_line(text))


def _title(row: Row) -> str:
    return f"{row.name} ({len(row.networks)} seeds)" if len(row.networks) > 1 else row.name


def _epochs(row: Row) -> str:
    found = sorted({network.epochs for network in row.networks})
    return "-".join(str(epochs) for epochs in dict.fromkeys((found[0], found[-1])))


def _accuracy(row: Row, attack: str) -> str:
    last, best = row.accuracy(attack), row.accuracy(attack, "best")
    assert last is not None, "an attack in common"
    seeds = last.seeds
    if len(seeds.values) > 1:
        chance = f"[{100 * seeds.least:.1f}-{100 * seeds.most:.1f}]"
    else:
        chance = f"±{100 * last.intervals[0].reach(seeds.mean):.1f}"
    return f"{100 * seeds.mean:.1f} {chance}" + ("" if best is None else f" ({100 * best.seeds.mean:.1f})")


def _pairing(difference: Difference) -> str:
    seeds = difference.seeds
    if not seeds:
        return "no seed in common"
    if len(seeds) > 1:
        return f"{len(seeds)} seeds"
    folded = max(len(difference.row.networks), len(difference.against.networks)) > 1
    return f"images, seed {seeds[0]}" if folded else "images"


def _contrast(contrast: Contrast | None) -> str:
    if contrast is None:
        return "-"
    if len(contrast.networks) == 1:
        pair = contrast.networks[0]
        p = f"p {pair.p_value:.3f}" if pair.p_value >= 0.001 else "p<0.001"
        return f"{100 * pair.difference:+.1f} {_points(pair.interval)} {p}"
    return f"{100 * contrast.seeds.mean:+.1f} {_points(contrast.seeds.interval)}"


def _points(interval: Interval | None) -> str:
    if interval is None:
        return "[equal by seed]"
    return f"[{100 * interval.low:+5.1f}, {100 * interval.high:+5.1f}]"


def _images(comparison: Comparison) -> str:
    found = set(comparison.num_images.values())
    return f"{found.pop()} test images" if len(found) == 1 else "test images"


def _headings(comparison: Comparison) -> list[str]:
    """The attacks, with their numbers of images where these differ."""
    images = comparison.num_images
    return [attack if len(set(images.values())) == 1 else f"{attack} (n {n})" for attack, n in images.items()]


def _accuracy_caption(comparison: Comparison) -> str:
    config = comparison.first.config
    threat = config["threat"]
    sentences = [f"{threat.get('norm', 'linf')}, eps {threat['eps']:.4g}, data {config['data']['name']}."]
    if any(len(row.networks) == 1 for row in comparison.rows):
        sentences.append(f"±: {PERCENT} % Wilson interval, its farther end.")
    if any(len(row.networks) > 1 for row in comparison.rows):
        sentences.append("Several seeds: mean [least-most].")
    sentences.append("FLOPs: of one training step, relative to a PGD-AT step of the same attack.")
    if comparison.left_out:
        sentences.append(f"Not met by all: {', '.join(comparison.left_out)}.")
    return " ".join(sentences)


def _difference_caption(comparison: Comparison) -> str:
    numbers = {len(difference.seeds) for difference in comparison.differences}
    sentences = [f"[{PERCENT} % interval]."]
    if 1 in numbers:
        sentences.append(
            "Paired by images: Tango's interval, p of the exact McNemar test; about the two networks, "
            "not about the methods that made them."
        )
    if max(numbers) > 1:
        sentences.append("Paired by seeds: Student's t; about the methods, on these images.")
    sentences.append("Not corrected for the number of comparisons.")
    return " ".join(sentences)
