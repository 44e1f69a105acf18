"""Handing a trained network on: weights with a model card, ONNX, RobustBench's form, the Hugging Face hub."""

from toughen.export.facts import Facts, facts_of_run
from toughen.export.hub import check_hub, push
from toughen.export.write import FORMATS, export

__all__ = ["FORMATS", "Facts", "check_hub", "export", "facts_of_run", "push"]
