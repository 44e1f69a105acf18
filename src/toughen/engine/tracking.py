"""A run's numbers, sent to where its user watches them. A tracker that fails stops tracking, never the run.

TensorBoard through Fabric's logger; W&B, trackio and MLflow through their own packages, since Lightning's loggers for
them come only with the whole of Lightning and let a branch write into the record of its run.
"""

import hashlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from toughen import processes
from toughen.errors import InputError, Notice
from toughen.run_folder import RunFolder

Numbers = Mapping[str, float]


class _Record(Protocol):
    """Where the numbers of one run go."""

    def log(self, numbers: Numbers, step: int) -> None: ...
    def close(self, *, complete: bool) -> None: ...


class Tracker:
    """The record of one run; without one it takes numbers and keeps none."""

    def __init__(self, record: _Record | None = None, name: str = "") -> None:
        self._record, self._name = record, name

    def log(self, row: Mapping[str, Any], *, epoch: int) -> None:
        """Send the numbers in ``row``, those in its parts as ``part/name``; what is no number stays."""
        if self._record is None:
            return
        try:
            numbers = {name: value for name, value in _leaves(row) if type(value) in (int, float)}
            self._record.log(numbers, epoch)
        except Exception as error:  # a service's own kinds of failure: none may cost the run
            self._record = None
            message = (
                f"train.logger={self._name} failed after epoch {epoch} ({_first_line(error)}); the run goes on without"
            )
            warnings.warn(message, Notice, stacklevel=2)

    def close(self, *, complete: bool) -> None:
        """Say that no more will come."""
        if self._record is None:
            return
        try:
            self._record.close(complete=complete)
        except Exception as error:
            warnings.warn(f"train.logger={self._name} could not be closed ({_first_line(error)})", Notice, stacklevel=2)


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        InputError: Its package can't be imported.
    """
    try:
        if name is not None:
            importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"train.logger={name} needs a package that can't be imported ({_first_line(error)});"
            f" pip install 'toughen[{name}]', or leave train.logger out"
        ) from None


@contextmanager
def tracked(name: str | None, folder: RunFolder) -> Iterator[Tracker]:
    """Open the record of a run, a new one or the one that it began, and close it at the end; the first process does.

    Args:
        name: Which tracker; None keeps no record.
        folder: The run.

    Raises:
        InputError: The tracker refuses, for example since nobody is logged in.
    """
    tracker, complete = Tracker(), False

    def begin() -> None:
        nonlocal tracker
        if name is not None:
            tracker = Tracker(_opened(name, folder), name)

    processes.by_first(begin)
    try:
        yield tracker
        complete = True
    finally:
        tracker.close(complete=complete)


def _opened(name: str, folder: RunFolder) -> _Record:
    try:
        return _OPEN[name](folder, folder.config())
    except Exception as error:
        raise InputError(
            f"train.logger={name} can't begin ({_first_line(error)}); set it up as its own documentation says, and go"
            f" on with --resume {folder.path}"
        ) from None


# -- the trackers ---------------------------------------------------------------------------------


class _TensorBoard:
    def __init__(self, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        self._logger = TensorBoardLogger(folder.path, name="tensorboard", version="", default_hp_metric=False)
        self._logger.log_hyperparams(dict(settings))

    def log(self, numbers: Numbers, step: int) -> None:
        self._logger.log_metrics(dict(numbers), step)
        self._logger.save()  # to be seen now

    def close(self, *, complete: bool) -> None:
        self._logger.finalize("success" if complete else "aborted")


class _WandbLike:
    """W&B, and trackio, which speaks the same language."""

    def __init__(self, package: Any, folder: RunFolder, settings: Mapping[str, Any], **options: Any) -> None:
        project = os.environ.get("WANDB_PROJECT", "toughen")
        self._run = package.init(project=project, config=dict(settings), resume="allow", **options)

    def log(self, numbers: Numbers, step: int) -> None:
        self._run.log({**numbers, "epoch": step})

    def close(self, *, complete: bool) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, folder: RunFolder, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow, key = mlflow, _key(folder)
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "toughen"))
        begun = mlflow.MlflowClient().search_runs([experiment.experiment_id], f"tags.toughen_run = '{key}'")
        if begun:
            mlflow.start_run(run_id=begun[0].info.run_id)
        else:
            mlflow.start_run(run_name=_title(folder), tags={"toughen_run": key})
            mlflow.log_dict(dict(settings), "config.yaml")
            for section, content in settings.items():  # by sections, since a call takes at most 100
                mlflow.log_params({name: str(value)[:500] for name, value in _leaves({section: content})})

    def log(self, numbers: Numbers, step: int) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self, *, complete: bool) -> None:
        self._mlflow.end_run("FINISHED" if complete else "KILLED")


def _wandb(folder: RunFolder, settings: Mapping[str, Any]) -> _WandbLike:
    import wandb

    return _WandbLike(wandb, folder, settings, id=_key(folder), name=_title(folder), dir=folder.path)


def _trackio(folder: RunFolder, settings: Mapping[str, Any]) -> _WandbLike:
    import trackio

    return _WandbLike(trackio, folder, settings, name=f"{_title(folder)}-{_key(folder)}")  # known by its name alone


_OPEN: dict[str, Callable[[RunFolder, Mapping[str, Any]], _Record]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _MLflow,
}


def _title(folder: RunFolder) -> str:
    run = folder.parent_run
    return folder.path.name if run is None else f"{run.path.name}/{folder.path.name}"


def _key(folder: RunFolder) -> str:
    """What names this run among all, after a resume too."""
    began = str(folder.provenance()["started"])
    return hashlib.sha256(f"{began} {folder.path.resolve()}".encode()).hexdigest()[:12]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
