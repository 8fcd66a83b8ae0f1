"""The snippets of docs/writing_a_pass.md run in order, and print what the page shows; docs/passes.md is current."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from moec.pipeline import registry
from tests.filecheck_plugin import run_moec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "writing_a_pass.md"
FENCE = re.compile(r"^```(\w+)(?: (\w+)=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def clean_modules() -> Iterator[None]:
    """Forgets the modules and passes that the page defines."""
    yield
    for name in ("fast_gelu", "broken"):
        sys.modules.pop(name, None)
        for key in [key for key in registry._classes if key[0] == name]:
            del registry._classes[key]


def test_writing_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_modules: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, Any] = {"__name__": "page"}
    printed = ""
    kinds = []
    for match in FENCE.finditer(PAGE.read_text(encoding="utf-8")):
        language, key, value, body = match.groups()
        line = PAGE.read_text(encoding="utf-8").count("\n", 0, match.start()) + 1
        kinds.append(language)
        if key == "file":
            Path(value).write_text(body, encoding="utf-8")
        elif language == "python":
            output = io.StringIO()
            with redirect_stdout(output):
                exec(compile("\n" * line + body, str(PAGE), "exec"), namespace)
            printed = output.getvalue()
        elif language == "sh":
            printed = ""
            for command in body.strip().splitlines():
                code, output_text = run_moec([*shlex.split(command), "2>&1"])
                assert code == (int(value) if key == "exit" else 0), f"{PAGE.name}:{line}: {output_text}"
                printed += output_text
        elif language == "text":
            assert printed.strip() == body.strip(), f"{PAGE.name}:{line} shows another output"
        elif language == "toml":
            assert body in (ROOT / "examples" / "custom_pass" / "pyproject.toml").read_text(encoding="utf-8")
        else:
            pytest.fail(f"{PAGE.name}:{line}: nothing runs the snippet")
    assert kinds.count("python") >= 6 and kinds.count("sh") >= 5


def test_the_page_and_the_example_are_one() -> None:
    example = (ROOT / "examples" / "custom_pass" / "moec_fast_gelu.py").read_text(encoding="utf-8")
    shown = next(
        match.group(4) for match in FENCE.finditer(PAGE.read_text(encoding="utf-8")) if match.group(3) == "fast_gelu.py"
    )
    assert example.partition("from __future__")[2] == shown.partition("from __future__")[2]


def test_the_list_of_passes_is_current() -> None:
    code, page = run_moec(["moec", "passes", "--markdown"])
    assert code == 0
    assert (ROOT / "docs" / "passes.md").read_text(encoding="utf-8") == page, (
        "write it again: moec passes --markdown > docs/passes.md"
    )


def test_every_built_in_pass_is_described() -> None:
    from moec.pipeline.catalogue import describe_all

    found, problems = describe_all(builtin_only=True)
    assert problems == []
    assert {"canonicalize", "cse", "dce"} <= {description.name for description in found}
    for description in found:
        assert description.summary.endswith("."), description.name
        assert all(option.help for option in description.options), description.name
