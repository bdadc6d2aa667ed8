"""GRIT as img2dataset stores it: tars of `KEY.jpg`, `KEY.txt`, `KEY.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from alpha_clip.regions import IMAGE_EXTENSIONS, SampleError
from data_pipeline.sources.base import BadShardError, Reject, SourceSample
from data_pipeline.sources.grit_records import GritRecords
from data_pipeline.sources.tars import Members, read_groups


@dataclass(frozen=True)
class GritSource(GritRecords):
    """Reads GRIT tars, local or remote; see `GritRecords` for its settings."""

    tars: ClassVar[bool] = True

    def read(self, shard: str) -> Iterator[SourceSample | Reject]:
        """Yield every sample of a tar; see `Source.read`."""
        if shard.endswith(".parquet"):
            raise BadShardError(
                f"{shard} is no tar; to read parquet files, set source to "
                "data_pipeline.sources.grit_parquet.GritParquetSource"
            )
        seen: set[str] = set()
        for key, members in read_groups(shard):
            if key is None:
                yield Reject("", None, "truncated_tar", f"{shard} ends early or is damaged")
                continue
            try:
                record = _record(key, members)
            except SampleError as error:
                yield Reject(key, None, error.reason, error.detail)
                continue
            yield self.build(key, record, partial(_image, members), seen)


def _image(members: Members) -> bytes:
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    raise SampleError("missing_image", f"there is only {sorted(members)}")


def _record(key: str, members: Members) -> dict[str, Any]:
    if "json" not in members:
        raise SampleError("missing_json", f"{key} has only {sorted(members)}")
    try:
        record = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise SampleError("bad_json", f"expected an object, got {type(record).__name__}")
    return record
