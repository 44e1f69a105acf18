"""Image sets by name, split and served from the device. Knows nothing of models, attacks or training.

Nothing here unpickles: images come from arrays, parquet files and image files.
"""

# The readers register themselves when they are imported.
from toughen.data import digits, folder, parquet  # noqa: F401
from toughen.data.augment import crop_flip
from toughen.data.image_set import DataSplits, ImageSet
from toughen.data.loader import DeviceLoader, in_order, probe
from toughen.data.settings import DATASETS, Augment, DataSettings, Rows, Source, parse_spec
from toughen.data.splits import load

__all__ = [
    "DATASETS",
    "Augment",
    "DataSettings",
    "DataSplits",
    "DeviceLoader",
    "ImageSet",
    "Rows",
    "Source",
    "crop_flip",
    "in_order",
    "load",
    "parse_spec",
    "probe",
]
