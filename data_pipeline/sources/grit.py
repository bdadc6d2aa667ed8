"""GRIT as img2dataset stores it: tars of `KEY.jpg`, `KEY.txt`, `KEY.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from alpha_clip.regions import IMAGE_EXTENSIONS, SampleError
from data_pipeline.sources.base import BadShardError, Reject, SourceSample
from data_pipeline.sources.grit_records import GritRecords
from data_pipeline.sources.tars import Group, Members, read_groups


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
        for group in read_groups(shard):
            if not group.members:
                where = f"{shard} ends early" if group.fault == "truncated_tar" else shard
                yield Reject("", None, str(group.fault), f"a sample is lost: {where}")
                continue
            item = self._item(group, seen)
            if group.fault and isinstance(item, Reject):
                item = replace(item, reason=group.fault)
            yield item

    def _item(self, group: Group, seen: set[str]) -> SourceSample | Reject:
        try:
            record = _record(group.key, group.members)
        except SampleError as error:
            return Reject(group.key, None, error.reason, error.detail)
        return self.build(group.key, record, partial(_image, group.members), seen)


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
