"""One image file as an image of 8 bits a channel, whatever it holds."""

from pathlib import Path

import numpy as np
from PIL import Image

from sakd.errors import DataError

MODES = {1: "L", 3: "RGB"}  # Pillow's names, by channels
WIDE_BY_FORMAT = ("PNG", "PPM")  # what Pillow gives as 32-bit integers has 16 bits in these
STEP = 257  # of 16-bit values for one of 8 bits: 65535 becomes 255


def decode(path: str | Path, channels: int, size: int | None = None) -> Image.Image:
    """The image, converted to grey (1) or RGB (3) of 8 bits a channel.

    Grey of 16 bits is scaled, and rounded; of colours with 16 bits the upper 8 are taken. Palettes become
    their colours. Transparency is left out, as by the field's loaders: a pixel counts by the colour that is
    stored under it. CMYK and YCbCr are converted by Pillow's formulas, without colour profiles. Of an
    animation, or of several pages, it is the first.

    Raises DataError naming the file if it is missing, damaged, has values of no defined range (floats,
    32-bit integers), or is not ``size`` pixels wide and high, where that is given.
    """
    try:
        with Image.open(path) as image:
            if size is not None and image.size != (size, size):
                raise DataError(f"found an image of {image.width}x{image.height}, expected {size}x{size}")
            return _of_8_bits(image).convert(MODES[channels])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise DataError(f"{path}: cannot be read ({error}); expected a whole image file") from error


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The image in a mode that Pillow's ``convert`` neither clips nor warns of."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in WIDE_BY_FORMAT):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + STEP // 2) // STEP).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"found {'floats' if image.mode == 'F' else '32-bit integers'}, of which nobody says what is "
            "black and what white; expected at most 16 bits a channel"
        )
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    return image
