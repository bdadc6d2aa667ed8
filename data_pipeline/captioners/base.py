"""What a captioner is: cut-outs and class names in, one caption a cut-out out."""

from __future__ import annotations

from abc import abstractmethod

from alpha_clip.regions import SampleError
from data_pipeline.foreground import Foreground
from data_pipeline.plugin import Plugin
from data_pipeline.segmenters.base import is_device_failure


class Captioner(Plugin):
    """Says what a cut-out shows. See `Plugin` for what subclasses are."""

    def batch_size(self) -> int:
        """Return how many cut-outs `caption_batch` should be given at a time."""
        return 1

    @abstractmethod
    def caption(self, foreground: Foreground, class_name: str) -> str:
        """Describe one cut-out.

        Args:
            foreground: The cut-out, and where in it the object is.
            class_name: The object's class, in words a person would use.

        Returns:
            The caption as its maker words it, which may be empty: the background is not stripped.
        """

    def caption_batch(
        self, foregrounds: list[Foreground], class_names: list[str]
    ) -> list[str | SampleError]:
        """Describe several cut-outs; those that fail do not touch the others.

        Args:
            foregrounds: Cut-outs, of any sizes.
            class_names: The class of each.

        Returns:
            For each its caption, or why there is none (`captioner_failed`, `empty_caption`).

        Raises:
            RuntimeError: If the device itself is broken; nothing after that could be trusted.
            ValueError: If there are not as many class names as cut-outs.
        """
        results: list[str | SampleError] = []
        for foreground, name in zip(foregrounds, class_names, strict=True):
            try:
                results.append(filled(self.caption(foreground, name)))
            except SampleError as error:
                results.append(error)
            except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
                if is_device_failure(error):
                    raise
                results.append(SampleError("captioner_failed", f"{type(error).__name__}: {error}"))
        return results


def filled(caption: str) -> str | SampleError:
    """Return a caption without space around it, or that it is empty (`empty_caption`)."""
    words = " ".join(caption.split())
    return words or SampleError("empty_caption", "the captioner had nothing to say")
