"""Pictures as they come: checked by their header, made upright, kept as they are where possible.

What a data set stores of a picture is a JPEG that every reader turns into the same pixels: upright,
RGB or grey, without EXIF. It is the input's own coded picture wherever that is one already.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_PX = 64_000_000
_ORIENTATION = 0x0112
_EXIF_MARKER = 0xE1


class SampleError(ValueError):
    """A sample or region that can't be used.

    Attributes:
        reason: A short, stable name to count by, such as `corrupt_image`.
        detail: What exactly was wrong.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


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
    with _reasons():
        image = _open(data, max_px)
        if _is_plain(image):
            rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
            return StoredImage(np.asarray(rgb), strip_exif(data), False)
        jpeg = _encode(image)
        return StoredImage(np.asarray(Image.open(io.BytesIO(jpeg))), jpeg, True)


def decode_jpeg(jpeg: bytes) -> Image.Image:
    """Decode a stored picture.

    Raises:
        SampleError: As `read_image` does.
    """
    with _reasons():
        image = _open(jpeg, MAX_IMAGE_PX, ("JPEG",))
        image.load()
        return image


def read_picture(data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a picture whose annotations were drawn on it by others.

    Some drew on pictures as stored, some as shown: whichever has the annotations' size.

    Args:
        data: Bytes of a JPEG, PNG or WebP file.
        size: Width and height that the annotations are for; `None` takes the picture as stored.

    Returns:
        The picture, RGB.

    Raises:
        SampleError: `corrupt_image`, `huge_image`, or `size_mismatch` if no way of turning it has
            that size.
    """
    with _reasons():
        image = _open(data, MAX_IMAGE_PX)
        if size is not None and image.size != size:
            image = ImageOps.exif_transpose(image)
        if size is not None and image.size != size:
            raise SampleError(
                "size_mismatch",
                f"the picture is {image.width} x {image.height} px, its annotations are for "
                f"{size[0]} x {size[1]}",
            )
        return image.convert("RGB")


def stored_jpeg(data: bytes, max_px: int = MAX_IMAGE_PX) -> tuple[bytes, bool]:
    """Return what `read_image` would store and whether it was encoded again.

    A picture that can stay as it is is not decoded, so damage in its pixels is not noticed here.

    Raises:
        SampleError: As `read_image` does.
    """
    with _reasons():
        image = _open(data, max_px)
        return (strip_exif(data), False) if _is_plain(image) else (_encode(image), True)


def upright_size(data: bytes, max_px: int = MAX_IMAGE_PX) -> tuple[int, int]:
    """Return `(width, height)` of the upright picture from its header, without decoding it.

    Raises:
        SampleError: As `read_image` does.
    """
    with _reasons():
        image = _open(data, max_px)
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return `(width, height)` from a JPEG's header, as stored.

    Raises:
        SampleError: `corrupt_image` if it is no JPEG, `huge_image` if it is above the limit.
    """
    with _reasons():
        return _open(data, MAX_IMAGE_PX, ("JPEG",)).size


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


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever Pillow raises about a bad picture into a counted reason."""
    try:
        with warnings.catch_warnings():
            # Of corrupt EXIF, which is taken out, and of sizes, for which there is a limit here.
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise SampleError("huge_image", str(error)) from error
    except UnidentifiedImageError as error:  # its text holds an address, never twice the same
        raise SampleError("corrupt_image", "not a picture of a format that is read") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError("corrupt_image", str(error)) from error


def _open(
    data: bytes, max_px: int, formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")
) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=list(formats))
    if image.width * image.height > max_px:
        raise SampleError("huge_image", f"{image.width} x {image.height} px, limit {max_px}")
    return image


def _is_plain(image: Image.Image) -> bool:
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    return image.format == "JPEG" and image.mode in ("RGB", "L") and upright


def _encode(image: Image.Image) -> bytes:
    image.load()
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` clips to white
        image = image.point(lambda v: v / 256).convert("L")
    buffer = io.BytesIO()
    ImageOps.exif_transpose(image).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
