"""The grammar of the command line: verbs, their options, their help."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NoReturn

from toughen import __version__
from toughen.cli.completion import offer_completion
from toughen.errors import InputError, unknown


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake, for the caller to print."""
        raise InputError(f"{message} (see `{self.prog} --help`)")

    def flags(self) -> list[str]:
        """Return the options by their long names."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def unrecognized(words: Sequence[str], options: argparse.Namespace) -> InputError:
    """Build the error for words of a command that its verb does not know."""
    flags = [word for word in words if word.startswith("-")]
    if flags:
        return unknown(f"option of `toughen {options.verb}`:", flags[0].partition("=")[0], options.flags())
    also = "; settings of a recipe (key.path=value) are for `toughen train`" if "=" in words[0] else ""
    return InputError(f"unrecognized arguments: {' '.join(words)} (see `toughen {options.verb} --help`){also}")


def _number(text: str) -> float:
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a fraction such as 8/255") from None


def make_parser(run: Mapping[str, Callable[[argparse.Namespace], None]]) -> Parser:
    """Return the parser; each verb stores its function of ``run`` under ``run``."""
    parser = Parser(prog="toughen", description="Make image classifiers robust to adversarial examples.")
    parser.add_argument("--version", action="version", version=f"toughen {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", parser_class=Parser)

    def verb(name: str, text: str, example: str) -> Parser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(verb=name, run=run[name], flags=sub.flags)
        return sub

    train = verb(
        "train",
        "Train a recipe; then print and plot what came out.",
        "toughen train digits train.epochs=4 branch_epoch=2",
    )
    train.add_argument(
        "words", nargs="*", metavar="[RECIPE] key.path=value", help="recipe (default: digits) and overrides"
    )
    train.add_argument("--resume", metavar="RUN", help="go on with an interrupted run")
    train.add_argument("--out", metavar="DIR", help="the run folder to make (default: a new one under runs/)")
    train.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and the layer map, train nothing"
    )
    _add_allow_code(train)

    analyze = verb("analyze", "Measure the criticality of each layer.", "toughen analyze small_cnn --data digits")
    _add_target(analyze)
    analyze.add_argument(
        "--samples", type=int, default=100, help="training images to measure on (default: %(default)s)"
    )
    analyze.add_argument("--steps", type=int, default=10, help="PGD steps (default: %(default)s)")
    analyze.add_argument("--json", metavar="FILE", help="write the report")
    analyze.add_argument("--plot", metavar="FILE", help="draw the report (.png, .pdf, .svg)")
    for flag, choices in {
        "--weakness-norm": ("dim", "rms", "none", "relative"),
        "--predecessor": ("execution", "graph"),
        "--first": ("literal", "input_ratio"),
        "--measure": ("index", "curvature"),
        "--tapped": ("output", "norm"),
        "--granularity": ("weights", "leaves", "blocks"),
    }.items():
        analyze.add_argument(
            flag, choices=choices, default=choices[0], help="see CriticalityOptions (default: %(default)s)"
        )
    analyze.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layer names to leave out")

    evaluate_ = verb(
        "evaluate",
        "Measure clean and attacked accuracy on test images, sample by sample.",
        "toughen evaluate small_cnn --attacks clean,pgd-20",
    )
    _add_target(evaluate_)
    _add_attack_options(evaluate_, default="clean,pgd-20")
    evaluate_.add_argument("--out", metavar="DIR", help="keep results there as they come, and go on from what is there")
    evaluate_.add_argument("--again", action="store_true", help="repeat what was measured before")
    evaluate_.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="with N seeds: mean, spread, worst of all"
    )
    evaluate_.add_argument(
        "--over", metavar="KEY=V,V,...", help="each attack with each value: eps=2/255,4/255, steps=1,5"
    )
    evaluate_.add_argument("--plot", metavar="FILE", help="draw accuracy over the values of --over (.png, .pdf, .svg)")
    evaluate_.add_argument("--per-class", action="store_true", help="also the accuracy of each class")

    transfer = verb(
        "transfer",
        "Black-box attacks: let every model attack every other one.",
        "toughen transfer small_cnn resnet18 --attacks pgd-10 --samples 50",
    )
    transfer.add_argument("targets", nargs="+", metavar="TARGET", help="run folders, or model specs")
    _add_target_options(transfer)
    _add_attack_options(transfer, default="pgd-20")
    transfer.add_argument("--plot", metavar="FILE", help="draw the matrix (.png, .pdf, .svg)")

    compare = verb("compare", "Put runs side by side.", "toughen compare runs/small_cnn-digits")
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the first is what the others are compared with; a sweep stands for its runs",
    )
    compare.add_argument(
        "--each", action="store_true", help="a row for each run (default: one for runs that differ in train.seed alone)"
    )
    compare.add_argument("--json", metavar="FILE", help="write all figures, with their intervals")

    export = verb(
        "export",
        "Hand a trained network on: weights with a model card, ONNX, RobustBench's form, the Hugging Face hub.",
        "toughen export runs/small_cnn-digits --to exported --license apache-2.0",
    )
    export.add_argument("target", metavar="RUN", help="a run folder, or a branch of one")
    export.add_argument("--to", required=True, metavar="DIR", help="new, empty, or of an earlier export")
    export.add_argument(
        "--format",
        default="safetensors",
        metavar="NAME,NAME",
        help="safetensors, onnx, robustbench (default: %(default)s)",
    )
    export.add_argument("--checkpoint", choices=("last", "best"), help="(default: last)")
    export.add_argument("--name", help="what the card calls it (default: the folder's name)")
    export.add_argument("--license", metavar="ID", help="of the weights, for the card: apache-2.0, mit, cc-by-4.0, ...")
    export.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub")
    export.add_argument("--private", action="store_true", help="a repository that is made there is not public")
    _add_allow_code(export)
    # what other verbs ask about their TARGET, and a run knows
    unasked = ("accurate", "alpha", "model", "width", "data", "image_size", "norm", "eps", "step_size", "seed")
    export.set_defaults(pretrained=False, device="cpu", **dict.fromkeys(unasked))

    report = verb(
        "report",
        "Write a page about runs: tables, curves, criticality, images, costs, commands.",
        "toughen report runs/small_cnn-digits",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="as in compare; a sweep stands for its runs")
    report.add_argument(
        "--each", action="store_true", help="a row for each run (default: one for runs that differ in train.seed alone)"
    )
    report.add_argument(
        "--transfer", action="append", default=[], metavar="FILE", help="a matrix of `toughen transfer --json`"
    )
    report.add_argument(
        "--out", metavar="FILE", help="the page (default: report.html in the run's folder; of several, here)"
    )

    sweep = verb(
        "sweep",
        "Train a grid of settings and seeds on Ray; the same command goes on after a stop.",
        "toughen sweep digits_methods --dry-run",
    )
    _add_allow_code(sweep)
    sweep.add_argument("file", metavar="FILE", help="a .yaml file: recipe, grid, runs, seeds, resources, retries")
    sweep.add_argument("--out", metavar="DIR", help="the folder of all runs (default: runs/NAME)")
    sweep.add_argument(
        "--workers", type=int, metavar="N", help="runs at a time (default: as many as there is room for)"
    )
    sweep.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster: auto, HOST:PORT, ray://HOST:PORT")
    sweep.add_argument("--dry-run", action="store_true", help="print the runs and what differs, train nothing")
    sweep.add_argument("--slurm", metavar="FILE", help="write the runs out as a SLURM array script, train nothing")

    reproduce = verb(
        "reproduce",
        "Train, measure and fill in tables and figures of the paper; the same command goes on after a stop.",
        "toughen reproduce 7 --dry-run",
    )
    reproduce.add_argument("pieces", nargs="+", metavar="TABLE|FIGURE|all", help="5, table-5, figure-2, ...")
    reproduce.add_argument(
        "--scale", choices=("full", "short", "digits"), default="digits", help="(default: %(default)s)"
    )
    reproduce.add_argument("--seeds", type=int, metavar="N", help="runs of each network (default: 10, 3, 1)")
    reproduce.add_argument("--out", metavar="DIR", help="the folder of all runs (default: runs/paper-SCALE)")
    reproduce.add_argument(
        "--data", action="append", default=[], metavar="NAME:FOLDER", help="a local copy of a data set"
    )
    reproduce.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE", help="weights that RobustBench offers by hand"
    )
    reproduce.add_argument("--checkpoint", choices=("last", "best"), default="last", help="(default: %(default)s)")
    reproduce.add_argument(
        "--clat", action="append", default=[], metavar="KEY=VALUE", help="another setting of CLAT, such as base=inner"
    )
    reproduce.add_argument("--minutes", type=_number, metavar="M", help="stop then; the same command goes on")
    reproduce.add_argument("--workers", type=int, metavar="N", help="train so many at a time, on Ray")
    reproduce.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster, with --workers")
    reproduce.add_argument("--cpus", type=_number, help="of each run on Ray, or in the file of --sweep (default: 1)")
    reproduce.add_argument("--gpus", type=_number, help="as --cpus (default: 0)")
    reproduce.add_argument("--dry-run", action="store_true", help="print what would be trained")
    reproduce.add_argument("--sweep", metavar="FILE", help="write the runs as a file for toughen sweep, train nothing")

    list_ = verb("list", "List what there is by name.", "toughen list layers resnet18")
    list_.add_argument(
        "what", choices=("models", "datasets", "methods", "attacks", "augmentations", "selectors", "recipes", "layers")
    )
    list_.add_argument(
        "target",
        nargs="?",
        metavar="MODEL",
        help="for layers: as in analyze; for models: a pattern such as 'timm/vit_*'",
    )
    _add_target_options(list_)
    offer_completion(parser)
    return parser


def _add_attack_options(parser: Parser, *, default: str) -> None:
    parser.add_argument(
        "--attacks", default=default, metavar="NAME,NAME", help="see `toughen list attacks` (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="first N test images (default: all)")
    parser.add_argument("--batch-size", type=int, help="(default: the run's, or 250)")
    parser.add_argument("--json", metavar="FILE", help="write the outcome of every sample")


def _add_allow_code(parser: Parser) -> None:
    parser.add_argument(
        "--allow-code",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let a recipe file or a run folder name methods and models of this package, which runs its code",
    )


def _add_target(parser: Parser) -> None:
    parser.add_argument(
        "target", metavar="TARGET", help="a run folder, an exported one, a weights file with --model, or a model spec"
    )
    _add_target_options(parser)


def _add_target_options(parser: Parser) -> None:
    _add_allow_code(parser)
    parser.add_argument("--model", metavar="SPEC", help="the model of a weights file")
    parser.add_argument("--pretrained", action="store_true", help="with the weights that the model's source publishes")
    parser.add_argument("--width", type=int, help="channels of the model's first stage")
    parser.add_argument("--checkpoint", choices=("last", "best"), help="of a run (default: last)")
    parser.add_argument("--accurate", metavar="RUN", help="mix TARGET with this run's network (adaptive smoothing)")
    parser.add_argument("--alpha", type=_number, metavar="A", help="weight of TARGET in the mixture, in [0, 1]")
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="digits, cifar10:PATH, folder:PATH, parquet:PATH, hf:NAME, ... (default: the run's, or digits)",
    )
    parser.add_argument("--image-size", type=int, help="resize the images of --data")
    parser.add_argument("--norm", choices=("linf", "l2"), help="of the threat model (default: the run's, or linf)")
    parser.add_argument("--eps", type=_number, help="its radius in [0, 1] pixel units (default: the run's, or 8/255)")
    parser.add_argument("--step-size", type=_number, help="of PGD (default: the run's, or eps/4)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of random starts (default: the run's, or 0)")
