"""Data: a folder of images becomes captioned, bucketed latents.

Images are drawn and held out (dataset.py), captioned (captions/), written into kohya's folders,
which are the contract with the trainers, read from there and encoded (latents.py). Open dataset.py
first, then kohya_folders.py.
"""

from lorasweep.data.dataset import BadImagesError, Dataset, ImageFile, ImageSet
from lorasweep.data.kohya_folders import Arm, ArmCaptions, CaptionedImage, FoldersError
from lorasweep.data.latents import Item

__all__ = [
    "Arm",
    "ArmCaptions",
    "BadImagesError",
    "CaptionedImage",
    "Dataset",
    "FoldersError",
    "ImageFile",
    "ImageSet",
    "Item",
]
