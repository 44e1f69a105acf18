"""Image sets by name, split, and served from memory or by worker processes. Knows nothing of models or attacks.

Nothing here unpickles: images come from arrays, parquet files and image files.
"""

# The readers register themselves when they are imported.
from toughen.data import cifar, digits, folder, hub, imagenet, parquet  # noqa: F401
from toughen.data.augment import AUGMENTS, Augmentation
from toughen.data.foreign import from_torch
from toughen.data.image_set import DataSplits, Images, ImageSet
from toughen.data.loader import DeviceLoader, StreamLoader, TrainLoader, train_loader
from toughen.data.settings import DATASETS, DataSettings, ExtraSettings, Rows, Source, parse_spec
from toughen.data.splits import load
from toughen.data.stream import StreamedSet
from toughen.data.unvaried import in_order, probe

__all__ = [
    "AUGMENTS",
    "DATASETS",
    "Augmentation",
    "DataSettings",
    "DataSplits",
    "DeviceLoader",
    "ExtraSettings",
    "ImageSet",
    "Images",
    "Rows",
    "Source",
    "StreamLoader",
    "StreamedSet",
    "TrainLoader",
    "from_torch",
    "in_order",
    "load",
    "parse_spec",
    "probe",
    "train_loader",
]
