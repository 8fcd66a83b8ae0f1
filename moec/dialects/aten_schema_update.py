"""Writes `aten_schemas.txt` from the installed torch: `python -m moec.dialects.aten_schema_update`."""

from __future__ import annotations

from pathlib import Path

SCHEMA_FILE = Path(__file__).with_name("aten_schemas.txt")


def schema_text() -> str:
    """One line per functional overload of the aten namespace, sorted."""
    import torch

    lines = set()
    for found in torch._C._jit_get_all_schemas():
        text = str(found)
        mutates = "!)" in text or found.overload_name.endswith("out")
        name = found.name.removeprefix("aten::")
        if found.name.startswith("aten::") and not mutates and "Tensor" in text and not name.startswith("__"):
            # alias annotations `Tensor(a)` do not matter for functional graphs
            plain = text.removeprefix("aten::").replace("(a)", "").replace("(b)", "").replace("(a -> *)", "")
            lines.add(plain)
    return "".join(f"{line}\n" for line in sorted(lines))


def main() -> None:
    """Overwrites the file beside this module."""
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
