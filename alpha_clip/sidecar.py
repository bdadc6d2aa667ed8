"""Masks beside the pixels: one line of JSON a sample, while the pictures stay where they are.

`NNNNN.regions.jsonl` holds what `KEY.json` would hold, with the sample's key and the checksum of
the picture that it was made of. Read together with that picture, it gives the same samples as a tar
that holds both, to the byte.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from alpha_clip.jpegs import SampleError, jpeg_size, stored_jpeg
from alpha_clip.samples import RegionSample, dump_record, from_record, load_record, to_record


@dataclass(frozen=True)
class SidecarEntry:
    """A sample without its picture.

    Attributes:
        sample: The sample; its `jpeg` is empty.
        crc32: Checksum of the picture's bytes as they lie in the input.
    """

    sample: RegionSample
    crc32: int

    def with_picture(self, data: bytes) -> RegionSample:
        """Return the sample with its picture, as it would be stored.

        Args:
            data: The picture's bytes as they lie in the input.

        Raises:
            SampleError: If it is damaged or has another size.
        """
        jpeg, _ = stored_jpeg(data)
        if jpeg_size(jpeg) != (self.sample.w, self.sample.h):
            raise SampleError("size_mismatch", f"{self.sample.key} has another size than its masks")
        return replace(self.sample, jpeg=jpeg)


def pack_entry(sample: RegionSample, data: bytes) -> bytes:
    """Return a checked line, with its end of line.

    Args:
        sample: The sample with its stored picture.
        data: The picture's bytes as they lie in the input.

    Raises:
        SampleError: If the sample is not sound.
    """
    sample.check()
    record = to_record(sample)
    # Twenty million lines: what is not known need not be said in each.
    known = [
        {k: v for k, v in r.items() if v is not None or k == "span"} for r in record["regions"]
    ]
    record["regions"] = known
    return dump_record({**record, "key": sample.key, "crc32": zlib.crc32(data)}) + b"\n"


def parse_entry(line: bytes) -> SidecarEntry:
    """Read a line, checking everything but the picture.

    Raises:
        SampleError: If anything about it is not sound.
    """
    record = load_record(line)
    key, crc32 = record.pop("key", None), record.pop("crc32", None)
    if not isinstance(key, str) or type(crc32) is not int:
        raise SampleError("bad_schema", "expected a text under 'key' and a number under 'crc32'")
    return SidecarEntry(from_record(key, record, None), crc32)


def join_sidecar(
    lines: Iterable[bytes], pictures: Iterable[tuple[str, bytes]]
) -> Iterator[RegionSample | SampleError]:
    """Put lines and pictures together.

    Args:
        lines: The lines of one sidecar; they are held in memory, about 1 kB a sample.
        pictures: Key and bytes of the input's pictures; those without a line are passed over.

    Yields:
        In the order of the pictures, each line's sample; then, for each line that found no picture,
        why (`missing_image`, `other_image`). Every line is answered once.
    """
    waiting: dict[str, bytes] = {}
    changed: set[str] = set()
    for line in lines:
        try:
            waiting[str(load_record(line).get("key"))] = line
        except SampleError as error:
            yield error
    for key, data in pictures:
        if key in waiting:
            try:
                entry = parse_entry(waiting[key])
                if entry.crc32 != zlib.crc32(data):  # the right one may follow, under the same key
                    changed.add(key)
                    continue
                yield entry.with_picture(data)
            except SampleError as error:
                yield error
            del waiting[key]
    for key in waiting:
        if key in changed:
            yield SampleError("other_image", f"{key} is not the picture that the masks are of")
        else:
            yield SampleError("missing_image", f"the picture of {key} is not there")
