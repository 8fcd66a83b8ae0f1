"""Rewriting: typed patterns with explained refusals, and the greedy driver that applies them."""

from moec.rewrite.greedy import RewriteResult, apply_patterns
from moec.rewrite.pattern import Refusal, RewriteError, RewritePattern, Rewriter, rewrite

__all__ = ["Refusal", "RewriteError", "RewritePattern", "RewriteResult", "Rewriter", "apply_patterns", "rewrite"]
