"""Handwritten digits of scikit-learn: 1,797 real images of 8x8, inside the package, no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998 (its test part).
"""

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from sakd.data.memory import ImageSet
from sakd.data.sets import always, stratified

TEST_IMAGES = 360


@always(classes=10, channels=1, image_size=8)
def digits() -> tuple[ImageSet, ImageSet]:
    """The digits: 1,437 images to train on and 360 stratified test images, the same at every seed."""
    from sklearn.datasets import load_digits  # takes a second to import, and only this data set needs it

    read = load_digits()
    grey = torch.tensor(read.images).mul(255 / 16).round().to(torch.uint8)  # 17 levels, 0 to 16
    everything = ImageSet(grey[:, None], torch.tensor(read.target, dtype=torch.int64))
    test = stratified(everything.labels, TEST_IMAGES)
    return everything[~test], everything[test]


def stand_in(like: Mapping[str, int]) -> tuple[ImageSet, ImageSet]:
    """The digits in place of another data set, ``like``.

    They are enlarged to its ``image_size``, with its ``channels`` and labels below its ``classes``.
    """

    def disguised(read: ImageSet) -> ImageSet:
        images = F.interpolate(read.images, size=like["image_size"]).expand(-1, like["channels"], -1, -1)
        return ImageSet(images.contiguous(), read.labels % like["classes"])

    train, test = digits()
    return disguised(train), disguised(test)
