"""Settings that every test needs, before any of them imports a library."""

from __future__ import annotations

import os

# The suite runs in several processes; more threads than cores make it slower and its timings meaningless.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hypothesis import settings

from tests.filecheck_plugin import pytest_collect_file  # noqa: F401
from tests.trace_cache import one_trace_for_each_config  # noqa: F401

# The same examples in every run: a change is judged by what it changes. `--hypothesis-profile default` draws others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
