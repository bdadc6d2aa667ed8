"""Cut-outs of drawn objects, and of photographs where they are at hand."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from alpha_clip.regions import decode_rle
from data_pipeline.foreground import cut_out

RED, BLUE = (200, 30, 40), (10, 20, 220)
WHITE, MEAN = (255, 255, 255), (123, 117, 104)


def scene(x1, y1, x2, y2, size=(60, 80)):
    """A red box on blue, and its mask."""
    rgb = np.full((*size, 3), BLUE, np.uint8)
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    rgb[mask] = RED
    return rgb, mask


def box(mask):
    """The mask's box, as left, top, right and bottom."""
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@pytest.mark.parametrize(
    "place",
    [(30, 20, 50, 40), (0, 0, 20, 20), (70, 5, 80, 55), (0, 25, 80, 30), (0, 0, 80, 60)],
    ids=["middle", "corner", "high", "long", "all"],
)
@pytest.mark.parametrize("size_px", [32, 100])
@pytest.mark.parametrize(("background", "colour"), [("white", WHITE), ("clip_mean", MEAN)])
def test_object_is_centred_and_fills_its_share(place, size_px, background, colour):
    found = cut_out(*scene(*place), background, size_px)
    assert found.rgb.shape == (size_px, size_px, 3)
    assert found.mask.shape == (size_px, size_px)
    left, top, right, bottom = box(found.mask)
    width, height = place[2] - place[0], place[3] - place[1]
    longer = max(right - left, bottom - top)
    assert 0.8 * size_px - 3 - 1.2 * size_px / max(width, height) <= longer <= 0.8 * size_px + 2
    assert (right - left) / longer == pytest.approx(width / max(width, height), abs=0.06)
    assert (bottom - top) / longer == pytest.approx(height / max(width, height), abs=0.06)
    for low, high in ((left, right), (top, bottom)):
        assert abs(low + high - size_px) <= 2 + size_px / max(width, height)
    assert (found.rgb[0, 0] == colour).all()
    middle = found.rgb[(top + bottom) // 2, (left + right) // 2].astype(int)
    assert abs(middle - RED).max() <= 12  # the long box is two pixels high at the small size


@pytest.mark.parametrize("size_px", [17, 100, 300])
def test_surroundings_do_not_bleed_into_the_object(size_px):
    """Every colour lies between the object's and the background's: there is no blue in it."""
    found = cut_out(*scene(13, 7, 44, 29), (0, 0, 0), size_px)
    share = found.rgb[..., :1] / 200
    np.testing.assert_allclose(found.rgb, share * RED, atol=1.5)
    assert share.max() == 1
    assert share.min() == 0
    inside = found.rgb[..., 0] >= 100
    assert (inside != found.mask).mean() < 0.01


def test_surroundings_stay_where_they_are_wanted():
    rgb, mask = scene(0, 20, 20, 40)
    found = cut_out(rgb, mask, "image", 25)  # one to one: the square is 25 pixels wide
    np.testing.assert_array_equal(found.rgb[:, 3:], rgb[17:42, :22])
    assert (found.rgb[:, :3] == MEAN).all()  # left of the picture
    np.testing.assert_array_equal(found.mask[:, 3:], mask[17:42, :22])


def test_colour_may_be_any():
    found = cut_out(*scene(30, 20, 50, 40), (1, 2, 3), 32)
    assert (found.rgb[0, 0] == (1, 2, 3)).all()


def test_nothing_is_enlarged_more_than_allowed():
    for most, side in ((8.0, 8), (2.0, 2), (0.5, 1)):
        found = cut_out(*scene(40, 30, 41, 31), "white", 160, max_enlarge=most)
        left, top, right, bottom = box(found.mask)
        assert right - left == bottom - top == side
    found = cut_out(*scene(30, 20, 50, 40), "white", 40, max_enlarge=0.25)
    assert 16 <= found.mask.sum() <= 36  # five pixels wide, give or take one


@pytest.mark.parametrize("place", [(0, 0), (79, 0), (0, 59), (79, 59), (41, 13)])
@pytest.mark.parametrize("size_px", [1, 2, 224])
def test_one_pixel_is_an_object(place, size_px):
    x, y = place
    rgb, mask = scene(x, y, x + 1, y + 1)
    found = cut_out(rgb, mask, "image", size_px)
    assert found.mask.any()
    enlarged = cut_out(rgb, mask, (0, 0, 0), size_px, fill=1.0, max_enlarge=500)
    assert (enlarged.rgb == RED).all()
    assert enlarged.mask.all()


def test_line_that_vanishes_keeps_a_mask():
    rgb, mask = scene(0, 30, 80, 31)
    found = cut_out(rgb, mask, "white", 10)
    assert found.mask.any()
    assert found.mask.sum() <= 10
    scattered = np.zeros((60, 80), bool)
    scattered[::7, ::7] = True
    assert cut_out(rgb, scattered, "white", 10).mask.any()


def test_object_of_several_parts_stays_together():
    rgb, mask = scene(0, 0, 10, 10)
    mask[50:60, 70:80] = True
    found = cut_out(rgb, mask, "white", 100)
    left, _, right, _ = box(found.mask)
    assert 78 <= right - left <= 81
    assert not found.mask[50, 50]


def test_inputs_are_left_alone_and_may_be_views():
    rgb, mask = scene(10, 10, 30, 30)
    before = rgb.copy()
    straight = cut_out(rgb, mask)
    np.testing.assert_array_equal(rgb, before)
    doubled = np.repeat(np.repeat(rgb, 2, 0), 2, 1)[::2, ::2]
    view = np.repeat(np.repeat(mask, 2, 0), 2, 1)[::2, ::2]
    doubled.setflags(write=False)
    np.testing.assert_array_equal(cut_out(doubled, view).rgb, straight.rgb)


def test_empty_mask_is_refused():
    rgb, mask = scene(0, 0, 1, 1)
    with pytest.raises(ValueError, match="the mask is empty"):
        cut_out(rgb, np.zeros_like(mask))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rgb": np.zeros((60, 80), np.uint8)}, r"expected a picture \[H, W, 3\] of uint8"),
        ({"rgb": np.zeros((60, 80, 3))}, r"expected a picture .* float64"),
        ({"mask": np.zeros((80, 60), bool)}, r"expected a mask \[60, 80\] of bool"),
        ({"mask": np.ones((60, 80), np.uint8)}, r"expected a mask .* got \[60, 80\] of uint8"),
        ({"background": "black"}, "background must be white, clip_mean, image or three numbers"),
        ({"background": (0, 0, 256)}, r"RGB of 0..255, got \(0, 0, 256\)"),
        ({"background": (0, 0)}, r"RGB of 0..255, got \(0, 0\)"),
        ({"size_px": 0}, "size_px must be at least 1"),
        ({"fill": 0.0}, r"fill in \(0, 1\]"),
        ({"fill": 1.5}, r"fill in \(0, 1\]"),
        ({"max_enlarge": 0.0}, "max_enlarge positive"),
        ({"max_enlarge": float("inf")}, "max_enlarge positive and finite"),
    ],
)
def test_what_can_not_be_cut_out_is_refused(changes, message):
    rgb, mask = scene(10, 10, 30, 30)
    with pytest.raises(ValueError, match=message):
        cut_out(**{"rgb": rgb, "mask": mask, **changes})


def test_photographs(photos):
    """The cut-out's pixels are the object's, and its mask has the object's shape."""
    truth = json.loads((photos / "instances.json").read_text())
    chosen = {}
    with tarfile.open(photos / "grit" / "00000.tar") as tar:
        for member in tar.getmembers()[:40]:
            if member.name.endswith(".jpg"):
                picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                chosen[int(member.name[:-4])] = np.asarray(picture)
    checked = 0
    for found in truth["annotations"]:
        rgb = chosen.get(found["image_id"])
        if rgb is None or found["iscrowd"]:
            continue
        rles = coco_mask.frPyObjects(found["segmentation"], *rgb.shape[:2])
        mask = decode_rle(coco_mask.merge(rles)).astype(bool)
        if mask.sum() < 500:
            continue
        cut = cut_out(rgb, mask)
        assert np.abs(cut.rgb[cut.mask].mean(0) - rgb[mask].mean(0)).max() < 12
        left, top, right, bottom = box(mask)
        share = mask.sum() / max(right - left, bottom - top) ** 2 * 0.8**2
        assert cut.mask.mean() == pytest.approx(share, rel=0.15)
        checked += 1
    assert checked > 20
