"""Passes and pipelines. Nothing here imports torch.

Reading order: `base` (what a pass is), `spec` (pipeline text), `options`, `registry`, `instruments`, `reproducer`,
`manager`.
"""

from moec.pipeline.base import Claim, Pass, PassContext, Remark, Statistic, option, register_pass
from moec.pipeline.instruments import Instrument, IRPrinting, PassExecution, PassObserver, Timing
from moec.pipeline.manager import (
    InvalidResultError,
    PassFailedError,
    PassManager,
    PassRecord,
    Pipeline,
    PipelinePass,
    PipelineReport,
)
from moec.pipeline.registry import PluginError, clashes, find_pass, pass_entries
from moec.pipeline.spec import PipelineError

__all__ = [
    "Claim",
    "IRPrinting",
    "Instrument",
    "InvalidResultError",
    "Pass",
    "PassContext",
    "PassExecution",
    "PassFailedError",
    "PassManager",
    "PassObserver",
    "PassRecord",
    "Pipeline",
    "PipelineError",
    "PipelinePass",
    "PipelineReport",
    "PluginError",
    "Remark",
    "Statistic",
    "Timing",
    "clashes",
    "find_pass",
    "option",
    "pass_entries",
    "register_pass",
]
