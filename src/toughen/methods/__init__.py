"""Methods that wrap an objective, and the stack that composes them in the order of the paper's row labels."""

from toughen.methods.averaging import EMA, SWA
from toughen.methods.awp import AWP
from toughen.methods.carry_over import CarryOver
from toughen.methods.clat import CLAT, CLATPaper, LiveCLAT
from toughen.methods.lora import LoRA
from toughen.methods.rift import RiFT
from toughen.methods.stack import Stack, stack
from toughen.methods.twins import TWINS
from toughen.methods.wrapper import LiveWrapper, Wrapper

__all__ = [
    "AWP",
    "CLAT",
    "EMA",
    "SWA",
    "TWINS",
    "CLATPaper",
    "CarryOver",
    "LiveCLAT",
    "LiveWrapper",
    "LoRA",
    "RiFT",
    "Stack",
    "Wrapper",
    "stack",
]
