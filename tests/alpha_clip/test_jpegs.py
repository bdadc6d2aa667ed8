"""Reading pictures: what is kept to the byte, what is encoded again, what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from alpha_clip.jpegs import read_image, strip_exif
from alpha_clip.regions import SampleError

ORIENTATION, DESCRIPTION = 0x0112, 0x010E
# What the stored pixels have to go through to be seen upright, by EXIF's definition.
UPRIGHT = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def exif(orientation):
    block = Image.Exif()
    block[ORIENTATION], block[DESCRIPTION] = orientation, "secret words"
    return block


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def difference(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int)).mean()


def reason(data, **options):
    with pytest.raises(SampleError) as caught:
        read_image(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"comment": b"x"}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_upright_jpeg_is_kept_to_the_byte(grit, mode, options):
    data = grit.encode(grit.image().convert(mode), **options)
    stored = read_image(data)
    assert stored.jpeg == data
    assert not stored.reencoded
    assert stored.rgb.dtype == np.uint8
    np.testing.assert_array_equal(stored.rgb, pixels(data))


@pytest.mark.parametrize("orientation", [None, 1])
def test_upright_jpeg_loses_its_exif_and_nothing_else(grit, orientation):
    block = exif(orientation or 1)
    if orientation is None:
        del block[ORIENTATION]
    data = grit.encode(grit.image(), exif=block, comment=b"kept")
    stored = read_image(data)
    assert not stored.reencoded
    assert b"secret words" in data
    assert b"secret words" not in stored.jpeg
    assert not Image.open(io.BytesIO(stored.jpeg)).getexif()
    assert b"kept" in stored.jpeg
    np.testing.assert_array_equal(pixels(stored.jpeg), pixels(data))
    np.testing.assert_array_equal(stored.rgb, pixels(data))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_turned_picture_is_made_upright(grit, orientation, format):
    plain = np.asarray(grit.image())
    stored = read_image(grit.encode(grit.image(), format, exif=exif(orientation)))
    assert stored.reencoded
    assert difference(stored.rgb, UPRIGHT[orientation](plain)) < 3
    np.testing.assert_array_equal(stored.rgb, pixels(stored.jpeg))
    assert not Image.open(io.BytesIO(stored.jpeg)).getexif()
    assert b"secret words" not in stored.jpeg


def test_turned_grey_jpeg_is_made_upright(grit):
    grey = grit.image().convert("L")
    stored = read_image(grit.encode(grey, exif=exif(6)))
    expected = np.rot90(np.asarray(grey.convert("RGB")), -1)
    assert stored.reencoded
    assert difference(stored.rgb, expected) < 3


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_other_formats_become_jpeg(grit, format):
    stored = read_image(grit.encode(grit.image(), format, exif=exif(1)))
    assert stored.reencoded
    assert Image.open(io.BytesIO(stored.jpeg)).format == "JPEG"
    assert difference(stored.rgb, np.asarray(grit.image())) < 3
    np.testing.assert_array_equal(stored.rgb, pixels(stored.jpeg))
    assert b"secret words" not in stored.jpeg


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "LA", "1"])
def test_other_modes_become_rgb(grit, mode):
    image = grit.image().quantize(64) if mode == "P" else grit.image().convert(mode)
    stored = read_image(grit.encode(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert stored.reencoded
    assert Image.open(io.BytesIO(stored.jpeg)).mode == "RGB"
    assert difference(stored.rgb, np.asarray(image.convert("RGB"))) < 8


def test_16_bit_png_keeps_its_tones(grit):
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 1024, (48, 1))
    for orientation, expected in ((1, ramp >> 8), (6, np.rot90(ramp >> 8, -1))):
        data = grit.encode(Image.fromarray(ramp), "PNG", exif=exif(orientation))
        stored = read_image(data)
        assert stored.reencoded
        assert difference(stored.rgb[..., 0], expected) < 3


def test_animated_webp_gives_its_first_picture(grit):
    first, second = grit.image(), Image.new("RGB", (80, 60), "white")
    data = grit.encode(first, "WEBP", save_all=True, append_images=[second], duration=100)
    stored = read_image(data)
    assert stored.reencoded
    assert difference(stored.rgb, np.asarray(first)) < 6


def test_phone_jpeg_with_a_second_picture_gives_its_first(grit):
    first, second = grit.image(), Image.new("RGB", (80, 60), "white")
    stored = read_image(grit.encode(first, "MPO", save_all=True, append_images=[second]))
    assert difference(stored.rgb, np.asarray(first)) < 3


def test_gif_is_refused(grit):
    frames = {"save_all": True, "append_images": [Image.new("RGB", (80, 60))]}
    assert reason(grit.encode(grit.image(), "GIF")) == "corrupt_image"
    assert reason(grit.encode(grit.image(), "GIF", **frames)) == "corrupt_image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.9])
def test_truncated_picture_is_corrupt(grit, format, share):
    data = grit.encode(grit.image(), format)
    assert reason(data[: int(len(data) * share)]) == "corrupt_image"


@pytest.mark.parametrize("data", [b"<html>404</html>", b"\xff\xd8", b"\xff\xd8\xff\xe1", bytes(99)])
def test_what_is_no_picture_is_corrupt(data):
    assert reason(data) == "corrupt_image"


def test_exif_that_cannot_be_written_again_is_a_reject_not_a_crash(grit):
    # A width stored as text: read without complaint, but not writable when the picture is turned.
    entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    entries = struct.pack("<HHI4s", 0x0100, 2, 2, b"a\0\0\0") + entries
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    assert reason(grit.encode(grit.image(), exif=block)) == "corrupt_image"


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_huge_picture_is_refused_by_its_header(side):
    # There are no pixels behind the header, so decoding would say corrupt_image.
    header = png_header(side, side) + struct.pack(">I", 0) + b"IDAT" + bytes(4)
    assert reason(header) == "huge_image"


def test_the_limit_itself_is_allowed(grit):
    data = grit.encode(grit.image(60, 80))
    assert read_image(data, max_px=4800).rgb.shape == (60, 80, 3)
    assert reason(data, max_px=4799) == "huge_image"


@pytest.mark.parametrize("fill", [1, 2, 5])
def test_fill_bytes_do_not_hide_exif(grit, fill):
    data = grit.encode(grit.image(), exif=exif(1))
    marker = data.index(b"\xff\xe1")
    padded = data[:marker] + b"\xff" * fill + data[marker:]
    stored = read_image(padded)
    assert not stored.reencoded
    assert b"secret words" not in stored.jpeg
    np.testing.assert_array_equal(pixels(stored.jpeg), pixels(data))


def test_strip_exif_takes_every_app1_and_no_other_segment(grit):
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>secret words</x:xmpmeta>"
    data = grit.encode(grit.image(), exif=exif(1), xmp=xmp, icc_profile=b"colours", comment=b"note")
    assert data.count(b"secret words") == 2
    stripped = strip_exif(data)
    assert b"secret words" not in stripped
    assert b"colours" in stripped
    assert b"note" in stripped
    assert strip_exif(stripped) == stripped
    np.testing.assert_array_equal(pixels(stripped), pixels(data))


def test_picture_encoded_again_carries_no_metadata(grit):
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>secret words</x:xmpmeta>"
    data = grit.encode(grit.image(), "WEBP", exif=exif(6), xmp=xmp)
    assert data.count(b"secret words") == 2
    assert b"secret words" not in read_image(data).jpeg
