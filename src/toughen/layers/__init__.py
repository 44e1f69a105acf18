"""Layers of any ``nn.Module``: which there are, what they compute, where a forward may stop, what trains."""

from toughen.layers.candidates import Granularity
from toughen.layers.compiled import compile_forward
from toughen.layers.folding import norms_folded
from toughen.layers.layer_map import Layer, LayerMap, map_layers
from toughen.layers.synced_norms import has_local_norms, localise_norms, synchronise_norms
from toughen.layers.taps import tap
from toughen.layers.trainable import NormStats, TrainableSet
from toughen.layers.view import ModelView

__all__ = [
    "Granularity",
    "Layer",
    "LayerMap",
    "ModelView",
    "NormStats",
    "TrainableSet",
    "compile_forward",
    "has_local_norms",
    "localise_norms",
    "map_layers",
    "norms_folded",
    "synchronise_norms",
    "tap",
]
