"""Decoding of image files to uint8 RGB tensors, with EXIF orientation applied once, here and nowhere else."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_FAST = (".jpg", ".jpeg", ".png", ".webp")  # what torchvision decodes; the rest goes through Pillow


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded, or whose size contradicts its annotation."""


def is_image(path: Path) -> bool:
    """True if the suffix, in any case, is one of an image."""
    return path.suffix.lower() in SUFFIXES


def read_image(path: Path, expected: tuple[int, int] | None = None) -> Tensor:
    """Decodes one file.

    Args:
        path: The file.
        expected: (height, width) of the annotation, if known. Where the file carries an EXIF rotation, this decides whether the boxes were
            drawn on the upright or on the stored picture.

    Returns:
        uint8 [3, h, w] RGB, channels last in memory: torchvision resizes that layout twice as fast.

    Raises:
        UnreadableImageError: If the file is missing, not decodable, or of another size than `expected`.
    """
    image = _decode(path, upright=True)
    if expected is None or tuple(image.shape[1:]) == tuple(expected):
        return image
    if tuple(image.shape[1:]) == (expected[1], expected[0]):
        stored = _decode(path, upright=False)
        if tuple(stored.shape[1:]) == tuple(expected):
            return stored
    found = f"{image.shape[2]}x{image.shape[1]}"
    hint = " (width and height are swapped)" if tuple(image.shape[1:]) == (expected[1], expected[0]) else ""
    raise UnreadableImageError(f"{path}: the file is {found} pixels, its annotation says {expected[1]}x{expected[0]}{hint}")


def _decode(path: Path, upright: bool) -> Tensor:
    if path.suffix.lower() in _FAST:
        try:
            return _decode_torchvision(path, upright)
        except RuntimeError:
            pass  # rare encodings that only Pillow knows; a broken file fails there too
    return _decode_pillow(path, upright)


def _decode_torchvision(path: Path, upright: bool) -> Tensor:
    from torchvision.io import decode_image

    image: Tensor = decode_image(str(path), mode="RGB", apply_exif_orientation=upright)
    if image.dim() != 3 or image.dtype != torch.uint8:
        raise RuntimeError(f"{path}: decoded to {image.dtype} {tuple(image.shape)}")  # animations and 16-bit files: left to Pillow
    return image


def _decode_pillow(path: Path, upright: bool) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened) if upright else opened
            if picture.mode.startswith("I"):  # 16 bits per pixel: keep the high byte, where a plain conversion would saturate
                high = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                picture = Image.fromarray(high)
            pixels = np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path}: cannot be decoded ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header alone.

    Raises:
        UnreadableImageError: If the header cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.format == "TIFF":
                opened.load()  # Pillow turns TIFF files itself while it loads them, and drops the tag
            w, h = opened.size
            turned = opened.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the axes
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path}: cannot be read ({error})") from error
    return (w, h) if turned else (h, w)
