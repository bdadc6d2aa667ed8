"""Region classification on COCO and LVIS: every annotated object, among all categories.

The paper's protocol (table 3 of arXiv 2312.03818, after CLIPSelf's) crops 1.5 times the box, with
the natural background or a masked one; a detector's protocol shows the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpha_clip.evaluation.annotations import FolderRegions, box_of, read_json
from alpha_clip.evaluation.classification import Classification
from alpha_clip.evaluation.proposals import image_file, image_size
from alpha_clip.geometry import Geometry
from alpha_clip.regions import Box, Region, SampleError

_EXPECTED = "COCO or LVIS instances (a JSON object with images, annotations and categories)"


class CocoClassification(Classification):
    """Which category is this object? From standard COCO or LVIS JSON.

    Crowds are left out; categories without objects stay among the candidates.

    Args:
        annotations: The JSON.
        images: Folder of the pictures: by `file_name`, or by the end of `coco_url` (LVIS), with or
            without its split.
        template: The prompt; `{}` stands for the category.
        focus: Ways of pointing, of `focus_baselines.FOCUS`; `None` takes all that the model's tower
            allows.
        geometry: How images become squares: `crop_box` cuts around the object.
        scale: Side of that square, relative to the longer side of the object's box.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read; `None` reads all.
        controls: Whether `alpha` is followed by its controls (another picture's alpha, another
            object's, inverted, alpha alone), four more passes.

    Raises:
        ValueError: If the file is of another format, or says a thing twice.
    """

    def __init__(
        self,
        annotations: str,
        images: str,
        template: str = "a photo of a {}.",
        focus: list[str] | None = None,
        geometry: Geometry = "crop_box",
        scale: float = 1.5,
        batch_size: int = 64,
        max_images: int | None = None,
        controls: bool = False,
    ) -> None:
        source = CocoRegions(annotations, images, max_images)
        super().__init__(source, [template], focus, geometry, scale, batch_size, controls=controls)


class CocoRegions(FolderRegions):
    """The objects of a COCO or LVIS file; see `CocoClassification`."""

    def __init__(self, annotations: str, images: str, max_images: int | None = None) -> None:
        record = read_json(annotations, _EXPECTED)
        try:
            categories = {c["id"]: str(c["name"]) for c in record["categories"]}
            pictures = {p["id"]: p for p in record["images"]}
            objects: dict[Any, list[Any]] = {key: [] for key in pictures}
            for found in record["annotations"]:
                objects[found["image_id"]].append(found)
            counts = len(record["images"]), len(record["categories"])
            known = all(a["category_id"] in categories for a in record["annotations"])
        except KeyError as error:
            raise ValueError(f"{annotations}: no {error}; expected {_EXPECTED}") from error
        except TypeError as error:
            raise ValueError(f"{annotations} is something else than {_EXPECTED}") from error
        if (len(pictures), len(categories)) != counts:
            raise ValueError(f"{annotations} has two images or two categories with one id")
        if not known:
            raise ValueError(f"{annotations} has objects of a category that it does not list")
        if not Path(images).is_dir():
            raise ValueError(f"{images} is no folder; give that of the split's pictures")
        self._folder = Path(images)
        self._label = {key: i for i, key in enumerate(sorted(categories))}  # ids have gaps
        chosen = [(pictures[key], found) for key, found in objects.items() if found]
        names = [categories[key].replace("_", " ") for key in self._label]
        super().__init__(chosen[:max_images], names)

    def file_of(self, entry: Any) -> tuple[Path, tuple[int, int] | None]:
        """Return the picture's file and size."""
        return image_file(self._folder, entry[0]), image_size(entry[0])

    def regions_of(self, entry: Any) -> Iterator[tuple[int, Region, Box | None]]:
        """Yield the objects of a picture; a mask is polygons or RLE, else the box."""
        for found in entry[1]:
            if found.get("iscrowd"):
                continue
            box = box_of(found.get("bbox"))
            mask = found.get("segmentation") or box
            if mask is None:
                raise SampleError("bad_area", f"object {found.get('id')} has no mask and no box")
            yield self._label[found["category_id"]], mask, box
