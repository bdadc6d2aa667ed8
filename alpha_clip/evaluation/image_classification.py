"""Zero-shot classification of whole images: what training on regions must not cost.

Pictures in a folder for each class, as ImageNet has them. Alpha marks the whole image; a plain CLIP
does the same task.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from alpha_clip.evaluation.annotations import FolderRegions, read_json
from alpha_clip.evaluation.classification import Classification
from alpha_clip.evaluation.imagenet_s import class_names, imagenet_prompts
from alpha_clip.geometry import SharedGeometry
from alpha_clip.regions import Box, Region

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
_NAMES = 'a JSON object {"folder": "name of the class"}'


class ImageClassification(Classification):
    """Which class is in this picture?

    Args:
        images: Folder with a folder of pictures for each class, such as ImageNet's `val`.
        names: What classes are called: `openai` or `wordnet` for ImageNet's folders, `folders`
            after the folders themselves, or a JSON file (`{"n03642806": "laptop", ...}`), whose
            classes are candidates also where there are no pictures.
        templates: `one` (`a photo of a {}.`) or OpenAI's `80`.
        geometry: How images become squares.
        batch_size: Images that go through the tower at a time.
        max_images: Most images to read, spread over the classes; `None` reads all.

    Raises:
        ValueError: If there are no pictures, or a folder has no name.
    """

    def __init__(
        self,
        images: str,
        names: str = "openai",
        templates: Literal["one", "80"] = "one",
        geometry: SharedGeometry = "center_crop",
        batch_size: int = 64,
        max_images: int | None = None,
    ) -> None:
        source = FolderClasses(images, names, max_images)
        prompts = imagenet_prompts(templates)
        super().__init__(source, prompts, ["no alpha"], geometry, batch_size=batch_size)


class FolderClasses(FolderRegions):
    """Pictures in a folder for each class; see `ImageClassification`."""

    def __init__(self, images: str, names: str, max_images: int | None) -> None:
        files = sorted(f for f in Path(images).glob("*/*") if f.suffix.lower() in _ENDINGS)
        if not files:
            raise ValueError(f"{images} holds no CLASS/PICTURE.jpg (or .JPEG, .png, .webp)")
        folders = sorted({file.parent.name for file in files})
        called = _names(folders, names)
        missing = [folder for folder in folders if folder not in called]
        if missing:
            raise ValueError(f"{names} has no name for {', '.join(missing[:5])}")
        self._label = {folder: i for i, folder in enumerate(called)}
        chosen = files
        if max_images is not None and max_images < len(files):
            chosen = [files[i * len(files) // max_images] for i in range(max_images)]
        super().__init__(chosen, list(called.values()))

    def file_of(self, entry: Any) -> tuple[Path, None]:
        """Return the picture's file."""
        return entry, None

    def regions_of(self, entry: Any) -> Iterator[tuple[int, Region, Box | None]]:
        """Yield the whole picture."""
        yield self._label[entry.parent.name], None, None


def _names(folders: list[str], names: str) -> dict[str, str]:
    """Return what each folder's class is called."""
    if names in ("openai", "wordnet"):
        return dict(zip(folders, class_names(folders, names), strict=True))
    if names == "folders":
        return {folder: folder.replace("_", " ") for folder in folders}
    record = read_json(names, _NAMES)
    if not isinstance(record, dict) or not all(isinstance(n, str) for n in record.values()):
        raise ValueError(f"{names} is something else than {_NAMES}")
    return dict(sorted(record.items()))
