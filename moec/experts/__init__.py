"""Layers with experts as passes see them: one expert in memory at a time, and edits that move everything together.

Reading order: `layer` finds the layers of a module, `expert` says what one expert is, `reading` loads one from the body
of its class, `bodies` writes bodies, `edit` changes which experts there are, `run` computes one layer alone.
"""

from moec.experts.edit import (
    EditError,
    alias_experts,
    permute_experts,
    protect_experts,
    replace_experts,
    replace_router,
    slice_experts,
)
from moec.experts.expert import (
    Activation,
    Affine,
    Constant,
    Dense,
    Expert,
    FeedForward,
    LowRank,
    Matrix,
    PartlyLowRank,
    Projection,
)
from moec.experts.layer import MoeLayer, find_moe_layers, find_unreadable
from moec.experts.reading import UnreadableExpertError, load_expert
from moec.experts.run import LayerRun, route_inputs_of, run_layer

__all__ = [
    "Activation",
    "Affine",
    "Constant",
    "Dense",
    "EditError",
    "Expert",
    "FeedForward",
    "LayerRun",
    "LowRank",
    "Matrix",
    "MoeLayer",
    "PartlyLowRank",
    "Projection",
    "UnreadableExpertError",
    "alias_experts",
    "find_moe_layers",
    "find_unreadable",
    "load_expert",
    "permute_experts",
    "protect_experts",
    "replace_experts",
    "replace_router",
    "route_inputs_of",
    "run_layer",
    "slice_experts",
]
