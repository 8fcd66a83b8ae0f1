"""Patterns that raise aten arithmetic to operations of the nn dialect, one file per kind of layer."""

from moec.passes.nn_patterns.activations import ACTIVATION_PATTERNS
from moec.passes.nn_patterns.attention import ATTENTION_PATTERNS
from moec.passes.nn_patterns.mlp import MLP_PATTERNS
from moec.passes.nn_patterns.norms import NORM_PATTERNS
from moec.passes.nn_patterns.rotary import ROTARY_PATTERNS

__all__ = ["ACTIVATION_PATTERNS", "ATTENTION_PATTERNS", "MLP_PATTERNS", "NORM_PATTERNS", "ROTARY_PATTERNS"]
