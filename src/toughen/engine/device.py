"""Where a run computes, and in which precision."""

import os
import shutil
import warnings
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from toughen import processes
from toughen.engine.recipe import Device, TrainSettings
from toughen.errors import InputError, Notice

_FOR_SEVERAL = (("strategy", "fsdp"), ("batch_norm", "local"))


def pick_device(wanted: Device) -> str:
    """Return ``"cuda"`` or ``"cpu"``.

    Raises:
        InputError: CUDA is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("the device is to be 'cuda' but torch finds no CUDA device; use auto or cpu")
    return wanted if wanted != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def make_fabric(settings: TrainSettings) -> Fabric:
    """Return what places a run on its devices, once the processes that ``torchrun`` started know one another.

    Raises:
        InputError: CUDA is wanted and there is none.
    """
    processes.join()
    device, count = pick_device(settings.device), processes.started()
    unused = [
        f"train.{name}={value}" for name, value in _FOR_SEVERAL if count == 1 and getattr(settings, name) == value
    ]
    if unused:
        text = f"{' and '.join(unused)} changes nothing in one process; torchrun starts several"
        warnings.warn(text, Notice, stacklevel=3)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # a method may leave out layers in one step that it trains in the next
    ddp = DDPStrategy(find_unused_parameters=True)
    fabric = Fabric(
        accelerator=device,
        devices=here if count > 1 else 1,
        num_nodes=count // here if count > 1 else 1,
        precision=pick_precision(settings),
        strategy=ddp if count > 1 else "auto",
    )
    fabric.launch()
    return fabric


def check_compiler(settings: TrainSettings) -> None:
    """Refuse to compile for the CPU without the compiler that torch would call.

    Raises:
        InputError: There is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if settings.compile and pick_device(settings.device) == "cpu" and shutil.which(compiler) is None:
        raise InputError(
            f"train.compile needs a C++ compiler on the CPU and finds no {compiler}; install g++, name another in CXX,"
            " or leave train.compile out"
        )


def pick_precision(settings: TrainSettings) -> Literal["32-true", "bf16-mixed"]:
    """Return Fabric's name of the precision."""
    if settings.precision != "auto":
        return settings.precision
    return "bf16-mixed" if pick_device(settings.device) == "cuda" else "32-true"
