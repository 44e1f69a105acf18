"""Random variation of training images: whole batches of uint8, on the device where they live."""

from toughen.data.augment.augmentation import AUGMENTS, Augmentation, moves_pixels
from toughen.data.augment.erasing import Cutout, Erase
from toughen.data.augment.idbh import IDBHSVHN, ColourShape, IDBHStrong, IDBHWeak
from toughen.data.augment.resized_crop import ResizedCrop
from toughen.data.augment.shift import Crop, CropFlip, CropShift, Flip

__all__ = [
    "AUGMENTS",
    "IDBHSVHN",
    "Augmentation",
    "ColourShape",
    "Crop",
    "CropFlip",
    "CropShift",
    "Cutout",
    "Erase",
    "Flip",
    "IDBHStrong",
    "IDBHWeak",
    "ResizedCrop",
    "moves_pixels",
]
