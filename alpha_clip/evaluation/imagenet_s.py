"""ImageNet-S zero-shot classification (table 2 of arXiv 2312.03818).

ImageNet pictures whose object has a mask (arXiv 2106.03149); 919 classes in the largest version.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alpha_clip.evaluation.annotations import FolderRegions, inside, read_json
from alpha_clip.evaluation.classification import Classification
from alpha_clip.geometry import Geometry
from alpha_clip.regions import Box, Region, SampleError, read_picture, upright_size

_EXPECTED = (
    "the published imagenet_919.json: a list of {image_pth, mask (COCO RLE), category_word (such "
    "as n01440764)}"
)
_EXTENSIONS = (".JPEG", ".jpg", ".png")


class ImageNetS(Classification):
    """Which ImageNet class is the object under the mask?

    The published figures are `mean per class/alpha` (mask), `mean per class/box alpha` and `mean
    per class/no alpha` (whole image) with `center_crop` and the template `a photo of a {}.`

    Args:
        images: With `annotations`, the folder that its `image_pth` begin in (it holds
            `ImageNetS919`); else the data set's own folder, such as `ImageNetS919`, with
            `validation` and `validation-segmentation`.
        annotations: The published `imagenet_919.json`; `None` reads the data set's own masks.
        templates: `one` (`a photo of a {}.`) or OpenAI's `80`.
        names: What classes are called: `wordnet`, the synset's first word as in the published
            script, or `openai`, the names that CLIP's authors chose.
        focus: Ways of pointing, of `focus_baselines.FOCUS`; `None` takes all that the model's tower
            allows.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read; `None` reads all.
        controls: Whether `alpha` is followed by its controls (another picture's alpha, another
            object's, inverted, alpha alone), four more passes.

    Raises:
        ValueError: If the file or the folder is of another format, or a class is none of
            ImageNet's.
    """

    def __init__(
        self,
        images: str,
        annotations: str | None = None,
        templates: Literal["one", "80"] = "one",
        names: Literal["wordnet", "openai"] = "wordnet",
        focus: list[str] | None = None,
        geometry: Geometry = "center_crop",
        batch_size: int = 64,
        max_images: int | None = None,
        controls: bool = False,
    ) -> None:
        read = PublishedRegions if annotations else SegmentationRegions
        source = read(images, annotations, names, max_images)
        prompts = imagenet_prompts(templates)
        super().__init__(source, prompts, focus, geometry, batch_size=batch_size, controls=controls)


class PublishedRegions(FolderRegions):
    """The entries of the published `imagenet_919.json`; see `ImageNetS`."""

    def __init__(
        self, images: str, annotations: str | None, names: str, max_images: int | None
    ) -> None:
        record = read_json(str(annotations), _EXPECTED)
        keys = {"image_pth", "mask", "category_word"}
        if not isinstance(record, list) or not all(
            isinstance(entry, dict) and entry.keys() >= keys for entry in record
        ):
            raise ValueError(f"{annotations} is something else than {_EXPECTED}")
        self._folder = Path(images)
        synsets = sorted({str(entry["category_word"]) for entry in record})
        self._label = {synset: i for i, synset in enumerate(synsets)}
        super().__init__(record[:max_images], class_names(synsets, names))

    def file_of(self, entry: Any) -> tuple[Path, tuple[int, int] | None]:
        """Return the picture's file and the size of its mask."""
        file = inside(self._folder, str(entry["image_pth"]))
        match entry["mask"]:
            case {"size": [int(height), int(width)]}:
                return file, (width, height)
        return file, None

    def regions_of(self, entry: Any) -> Iterator[tuple[int, Region, Box | None]]:
        """Yield the object."""
        yield self._label[str(entry["category_word"])], entry["mask"], None


class SegmentationRegions(FolderRegions):
    """The data set's own validation pictures and masks; see `ImageNetS`."""

    def __init__(
        self, images: str, annotations: str | None, names: str, max_images: int | None
    ) -> None:
        folder = Path(images)
        self._pictures = folder / "validation"
        masks = sorted((folder / "validation-segmentation").glob("n*/*.png"))
        if not masks:
            raise ValueError(
                f"{folder} holds no validation-segmentation/nNNNNNNNN/*.png; give ImageNet-S's own "
                "folder, or the published JSON (annotations)"
            )
        synsets = sorted({mask.parent.name for mask in masks})
        self._label = {synset: i for i, synset in enumerate(synsets)}
        super().__init__(masks[:max_images], class_names(synsets, names))

    def file_of(self, entry: Any) -> tuple[Path, tuple[int, int] | None]:
        """Return the picture's file and the size of its mask."""
        stem = self._pictures / entry.parent.name / entry.stem
        files = [stem.with_name(stem.name + extension) for extension in _EXTENSIONS]
        size = upright_size(entry.read_bytes())
        return next((f for f in files if f.is_file()), files[0]), size

    def regions_of(self, entry: Any) -> Iterator[tuple[int, Region, Box | None]]:
        """Yield the object: pixels that say its class, R + 256 G, counted from 1."""
        pixels = np.asarray(read_picture(entry.read_bytes())).astype(np.int64)
        label = self._label[entry.parent.name]
        mask = pixels[..., 0] + 256 * pixels[..., 1] == label + 1
        if not mask.any():
            raise SampleError("bad_area", f"{entry} has no pixel of its class, {label + 1}")
        yield label, mask, None


def imagenet_prompts(templates: Literal["one", "80"]) -> list[str]:
    """Return `a photo of a {}.`, or the 80 prompts of CLIP's authors."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    if templates == "one":
        return ["a photo of a {}."]
    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def class_names(synsets: list[str], kind: str) -> list[str]:
    """Return what classes are called.

    Args:
        synsets: WordNet ids, such as `n01440764`.
        kind: `wordnet`: the first word of the synset, with underscores, as the published script
            has it; `openai`: the names of CLIP's authors, as open_clip keeps them.

    Raises:
        ValueError: If a synset is none of ImageNet-1k's.
    """
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    known = info.label_names()
    unknown = sorted(set(synsets) - set(known))
    if unknown:
        raise ValueError(f"{unknown[:5]} are no classes of ImageNet-1k, such as n01440764")
    if kind == "openai":
        return [IMAGENET_CLASSNAMES[known.index(synset)] for synset in synsets]
    first = (info.label_name_to_description(synset).split(",")[0] for synset in synsets)
    return [name.strip().replace(" ", "_") for name in first]
