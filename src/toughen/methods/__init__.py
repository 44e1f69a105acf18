"""Methods that wrap an objective, and the stack that composes them in the order of the paper's row labels."""

from toughen.methods.clat import CLAT, CLATPaper, LiveCLAT
from toughen.methods.stack import Stack, stack
from toughen.methods.wrapper import LiveWrapper, Wrapper

__all__ = ["CLAT", "CLATPaper", "LiveCLAT", "LiveWrapper", "Stack", "Wrapper", "stack"]
