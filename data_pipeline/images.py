"""Pictures as they come: checked by their header, made upright, kept as they are where possible."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from alpha_clip.regions import MAX_IMAGE_PX, SampleError

_ORIENTATION = 0x0112
_EXIF_MARKER = 0xE1


@dataclass(frozen=True)
class StoredImage:
    """A picture and the JPEG it is stored as.

    Attributes:
        rgb: Pixels `[H, W, 3]` of the stored JPEG.
        jpeg: The input's bytes where they are an upright RGB or grey JPEG (without its EXIF
            block), else the picture encoded again at quality 95.
        reencoded: Whether it was encoded again.
    """

    rgb: NDArray[np.uint8]
    jpeg: bytes
    reencoded: bool


def read_image(data: bytes, max_px: int = MAX_IMAGE_PX) -> StoredImage:
    """Decode a picture for storing.

    Args:
        data: Bytes of a JPEG, PNG or WebP file.
        max_px: Most pixels to decode; the header tells, before memory is spent.

    Raises:
        SampleError: `corrupt_image` or `huge_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
            if image.width * image.height > max_px:
                raise SampleError(
                    "huge_image", f"{image.width} x {image.height} px, limit {max_px}"
                )
            image.load()
            upright = image.getexif().get(_ORIENTATION, 1) == 1
            if image.format == "JPEG" and image.mode in ("RGB", "L") and upright:
                return StoredImage(np.asarray(image.convert("RGB")), strip_exif(data), False)
            if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` clips to white
                image = image.point(lambda v: v / 256).convert("L")
            buffer = io.BytesIO()
            ImageOps.exif_transpose(image).convert("RGB").save(buffer, "JPEG", quality=95)
    except Image.DecompressionBombError as error:
        raise SampleError("huge_image", str(error)) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError("corrupt_image", str(error)) from error
    jpeg = buffer.getvalue()
    return StoredImage(np.asarray(Image.open(io.BytesIO(jpeg))), jpeg, True)


def strip_exif(jpeg: bytes) -> bytes:
    """Return a JPEG without its EXIF and XMP blocks; the coded picture stays as it is."""
    kept, position = [jpeg[:2]], 2
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        marker = jpeg[position + 1]
        if marker == 0xFF:  # a fill byte, of which any number may precede a marker
            position += 1
            continue
        if marker == 0xDA:  # the scan: all that follows is the picture
            break
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if marker != _EXIF_MARKER:
            kept.append(jpeg[position:end])
        position = end
    return b"".join([*kept, jpeg[position:]])
