"""The base of everything that is stored as JSON: artifacts, ledgers, plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moec.errors import UnsafeInputError


class Record(BaseModel):
    """Base of what is stored as JSON: immutable, and refuses fields that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def write_record(path: Path, record: Record) -> None:
    """Writes `record` as JSON, fields in the order of their declaration; NaN and infinities become null."""
    value = json.loads(record.model_dump_json(by_alias=True))
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Reads a record that `write_record` wrote. Raises UnsafeInputError that names the field which is malformed."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "(the whole)"
        raise UnsafeInputError(
            f"a file of the artifact is malformed: {first['msg']}",
            where=f"{path}, field {field}",
            hint="compile the artifact again",
        ) from None
