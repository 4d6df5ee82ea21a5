"""What an image becomes that is not RGB or grey of 8 bits: scaled, converted, or refused by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sakd.data.pictures import decode
from sakd.errors import DataError

WIDE = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)  # every value of 16 bits


def saved(image: Image.Image, path: Path, **how: object) -> Path:
    image.save(path, **how)
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path, ending, channels):
    path = saved(Image.fromarray(WIDE), tmp_path / f"wide.{ending}")
    expected = (WIDE / 257).round().astype("uint8")
    found = np.asarray(decode(path, channels))
    assert (found.reshape(256, 256, channels) == expected[:, :, None]).all()


@pytest.mark.parametrize("order", "<>")
def test_grey_of_16_bits_counts_alike_in_either_order_of_bytes(tmp_path, order):
    """Pillow has names of their own for both."""
    path = saved(Image.fromarray(WIDE.astype(f"{order}u2")), tmp_path / "wide.tif")
    with Image.open(path) as image:
        assert image.mode == {"<": "I;16", ">": "I;16B"}[order]
    assert (np.asarray(decode(path, 1)) == (WIDE / 257).round()).all()


@pytest.mark.parametrize(
    ("values", "what"), [(np.float32, "floats"), (np.int32, "32-bit integers")], ids=["floats", "integers"]
)
def test_values_without_a_range_are_refused_by_name(tmp_path, values, what):
    path = saved(Image.fromarray(WIDE.astype(values)), tmp_path / "range.tif")
    with pytest.raises(DataError, match=rf"^{path}: found {what}.*; expected at most 16 bits"):
        decode(path, 3)


COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype("uint8")
TRANSPARENT = bytes([0, 90, *[255] * 14])


def colours_with_alpha() -> Image.Image:
    image = Image.fromarray(COLOURS)
    image.putalpha(Image.fromarray(COLOURS[:, :, 0]))
    return image


def palette() -> Image.Image:
    return Image.fromarray(COLOURS).quantize(16)


OTHERS = {  # each with what it shows, were it RGB of 8 bits
    "alpha": (colours_with_alpha, {}, lambda: Image.fromarray(COLOURS)),
    "grey and alpha": (
        lambda: colours_with_alpha().convert("LA"),
        {},
        lambda: Image.fromarray(COLOURS).convert("L").convert("RGB"),
    ),
    "palette": (palette, {}, lambda: palette().convert("RGB")),
    "one transparent colour": (palette, {"transparency": 0}, lambda: palette().convert("RGB")),
    "transparent colours": (palette, {"transparency": TRANSPARENT}, lambda: palette().convert("RGB")),
    "black and white": (
        lambda: Image.fromarray(COLOURS).convert("1"),
        {},
        lambda: Image.fromarray(COLOURS).convert("1").convert("RGB"),
    ),
}


@pytest.mark.parametrize(("image", "how", "expected"), OTHERS.values(), ids=OTHERS)
def test_transparency_is_left_out_and_colours_stay(tmp_path, image, how, expected):
    path = saved(image(), tmp_path / "other.png", **how)
    assert (np.asarray(decode(path, 3)) == np.asarray(expected())).all()
    assert (np.asarray(decode(path, 1)) == np.asarray(expected().convert("L"))).all()


def test_cmyk_is_converted(tmp_path):
    path = saved(Image.fromarray(COLOURS).convert("CMYK"), tmp_path / "print.tif")
    assert (np.asarray(decode(path, 3)) == COLOURS).all()


def test_of_an_animation_the_first_image_is_taken(tmp_path):
    first, second = (Image.fromarray(np.full((8, 8, 3), grey, "uint8")) for grey in (10, 200))
    path = saved(first, tmp_path / "moves.gif", save_all=True, append_images=[second])
    assert (np.asarray(decode(path, 1)) == 10).all()
