"""The model card: what the network is, what was measured of it and how, where it is from, how to use it."""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

from toughen.errors import one_line
from toughen.export.facts import Facts
from toughen.statistics import wilson_interval

TAGS = ("image-classification", "adversarial-robustness", "adversarial-training")


def model_card(facts: Facts, *, files: dict[str, str]) -> str:
    """Return the text of ``README.md``, with the metadata that the Hugging Face hub reads.

    Args:
        facts: Of the network.
        files: What lies beside the card, by file name: one clause each.
    """
    parts = [
        f"---\n{_metadata(facts).to_yaml()}\n---",
        f"# {_text(facts.name)}",
        _what_it_is(facts),
        "## Accuracy\n\n" + _accuracy(facts),
        "## Use\n\n" + _use(facts),
        "## Training\n\n" + _training(facts),
        "## Files\n\n" + "\n".join(f"- `{name}`: {what}" for name, what in files.items()),
    ]
    return "\n\n".join(parts) + "\n"


def eps_text(eps: float) -> str:
    """Return a radius as it is usually written: ``8/255``, or a decimal where it is no whole number of levels."""
    levels = round(255 * eps)
    return f"{levels}/255" if levels and abs(levels - 255 * eps) < 1e-6 else f"{eps:g}"


def _metadata(facts: Facts) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData  # slow to import

    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=facts.network.data,
            dataset_name=facts.network.data,
            dataset_split="test",
            metric_type="accuracy",
            metric_name="accuracy" if attack == "clean" else f"accuracy under {attack}{_budget(found)}",
            metric_value=round(found["accuracy"], 4),
        )
        for attack, found in facts.evaluations.items()
    ]
    tags = [*TAGS, *(["clat"] if "CLAT" in facts.method else [])]
    return ModelCardData(
        license=facts.license,
        library_name="toughen",
        pipeline_tag="image-classification",
        tags=tags,
        model_name=facts.name,
        eval_results=results,
    )


def _budget(found: dict[str, Any]) -> str:
    """The threat model of an evaluation; nothing for attacks that have none, such as Pixle."""
    settings = found["settings"]
    threats = [part["threat"] for part in (settings, *settings.values()) if isinstance(part, dict) and "threat" in part]
    return f", {threats[0]['norm']} eps {eps_text(threats[0]['eps'])}" if threats else ""


def _threat(facts: Facts) -> str:
    return f"{facts.network.norm} eps {eps_text(facts.network.eps)}"


def _what_it_is(facts: Facts) -> str:
    network = facts.network
    channels, height, width = network.image_shape
    itself = ", normalises them itself" if network.mean is not None else ""
    return (
        f"`{_text(network.model)}` ({facts.num_parameters:,} parameters), trained on `{_text(network.data)}` with"
        f" {_text(facts.method)} to be robust to perturbations of {_threat(facts)}."
        f" It takes images [B, {channels}, {height}, {width}] with pixels in [0, 1]{itself}, and returns logits of"
        f" {len(network.classes)} classes."
    )


def _accuracy(facts: Facts) -> str:
    lines = ["| attack | accuracy, % | 95 % interval | n | settings |", "|---|---|---|---|---|"]
    for attack, found in facts.evaluations.items():
        interval = wilson_interval(sum(found["correct"]), found["n"])
        lines.append(
            f"| {_text(attack)} | {100 * found['accuracy']:.2f} | {100 * interval.low:.1f} to {100 * interval.high:.1f}"
            f" | {found['n']} | {_text(_settings(found))} |"
        )
    seeds = sorted({found["seed"] for found in facts.evaluations.values()})
    notes = [
        f"Threat model: {_threat(facts)}, pixels in [0, 1]. Test images of `{_text(facts.network.data)}`:"
        f" {facts.num_test} in the run. Seed of the attacks: {', '.join(map(str, seeds))}. Interval: Wilson's, over"
        " test images, for this one network. Accuracy under an attack is an upper bound of robust accuracy."
    ]
    notes += dict.fromkeys(f"Remark: {_text(one)}." for f in facts.evaluations.values() for one in f["remarks"])
    flags = [flag for found in facts.evaluations.values() for flag in found["flags"]]
    notes += dict.fromkeys(f"Sanity flag: {_text(flag['check'])}: {_text(flag['seen'])}." for flag in flags)
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes)


def _settings(found: dict[str, Any]) -> str:
    """The few settings that a reader asks for; all of them are in the run's evaluations."""
    settings, stages = found["settings"], [stage["name"] for stage in found["stages"]]
    shown = [f"{key} {settings[key]:.4g}" for key in ("steps", "step_size", "restarts") if key in settings]
    return ", ".join([_budget(found).removeprefix(", "), *(shown or (stages if len(stages) > 1 else []))])


def _use(facts: Facts) -> str:
    network = facts.network
    code = ", allow_code=True" if ":" in network.model else ""
    allow = f" --allow-code {network.model.partition(':')[0].partition('.')[0]}" if code else ""
    return (
        "```python\n"
        "import toughen as tg\n\n"
        f'model = tg.models.load("FOLDER"{code})  # or huggingface_hub.snapshot_download("OWNER/NAME")\n'
        "logits = model(images)  # pixels in [0, 1], as they are\n"
        "```\n\n"
        f"Measured again by `toughen evaluate FOLDER --data {_text(network.data)}"
        f" --attacks {_text(','.join(facts.evaluations))}{allow}`, with the images of the run. Classes, in the order of"
        f" the logits: {', '.join(_text(name) for name in network.classes[:20])}"
        + (f", and {len(network.classes) - 20} more in `config.json`." if len(network.classes) > 20 else ".")
    )


def _training(facts: Facts) -> str:
    known = facts.provenance
    versions = known.get("versions", {})
    lines = [
        f"- Method: {_text(facts.method)}; checkpoint `{facts.checkpoint}`, after {facts.epoch} epochs",
        f"- Command: `{_text(_without_folders(known.get('command', '')))}`",
        f"- Commit of toughen: {_text(known.get('commit') or 'a release')}; seed {known.get('seed')}",
        f"- Versions: {', '.join(f'{_text(name)} {_text(value)}' for name, value in versions.items())}",
        f"- Hardware: {_text(known.get('device', ''))}, precision {_text(known.get('precision', ''))}",
        f"- Other images than those of the data set: {'yes' if facts.extra_data else 'no'}",
    ]
    if facts.selected is not None:
        lines.insert(1, f"- Layers that trained at the end: {', '.join(f'`{_text(one)}`' for one in facts.selected)}")
    return "\n".join(lines)


def _without_folders(command: str) -> str:
    """Return a command without the folders of its author's machine."""
    return re.sub(r"(^|[\s='\":])[~/][^\s'\"]*/", r"\1.../", command)


def _text(value: object) -> str:
    """Return a text that stays in its line, its cell and its code span: a run folder may be anybody's."""
    return one_line(str(value)).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
