"""The crops that the official eval_linear.py trains on, torchvision's RandomResizedCrop and
RandomHorizontalFlip as they are by default. What is drawn is a function of (seed, epoch, image):
a run that is resumed sees what it would have seen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torch import Tensor

from ...data.augmentation import View, boxes, draw
from ...data.sampler import epoch_order
from ..images import EvalTransform, LabeledImages, to_tensor

SCALE = (0.08, 1.0)  # share of the image's area


@dataclass(frozen=True)
class RandomCrop:
    """RGB image -> normalized (3, crop, crop) fp32: a box of 3:4 to 4:3, resized by PIL's
    antialiased bilinear, every other one mirrored. sample: number of the image, which decides with
    seed and epoch."""

    evaluated: EvalTransform  # whose side, mean and std this takes
    seed: int
    epoch: int
    sample: int

    def __call__(self, image: Image.Image) -> Tensor:
        side = self.evaluated.crop
        view = View(side, SCALE, blur_p=0, solarize_p=0, blur_radius=(0, 0))
        drawn = draw(self.seed, self.epoch, np.array([self.sample]), (view,))
        y, x, h, w = boxes(drawn.tries[0], image.height, image.width)[0]
        image = image.crop((x, y, x + w, y + h))
        image = image.resize((side, side), Image.Resampling.BILINEAR)
        if drawn.views["flip"][0, 0]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image, self.evaluated.mean, self.evaluated.std)


@dataclass(frozen=True)
class TrainingCrops(LabeledImages):
    """Labeled images with a crop of its own for each. transform: of the evaluation. samples: item i
    is image number samples[i] of the set, int64 (N,)."""

    samples: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    seed: int = 0
    epoch: int = 0

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, str | None]:
        assert isinstance(self.transform, EvalTransform)
        crop = RandomCrop(self.transform, self.seed, self.epoch, int(self.samples[i]))
        own = replace(self, transform=crop)
        return super(TrainingCrops, own).__getitem__(i)


def training_crops(images: LabeledImages, seed: int, epoch: int) -> TrainingCrops:
    """A crop of each image, in the order of this epoch. The images have an `EvalTransform`, whose
    side, mean and std the crops take."""
    samples = epoch_order(seed, epoch, len(images))
    shuffled = vars(images.pick(samples.tolist()))
    return TrainingCrops(**shuffled, samples=samples, seed=seed, epoch=epoch)
