"""Layers with experts as passes see them: one expert in memory at a time, and edits that move everything together.

Reading order: `layer` finds the layers of a module, `expert` says what one expert is, `reading` loads one from the body
of its class, `bodies` writes bodies, `edit` changes which experts there are, `bank` shares them between layers, `dense`
makes experts of dense blocks, `run` computes one layer alone.
"""

from moec.experts.dense import DenseLayer, find_dense_layers, load_dense, make_sparse, replace_dense
from moec.experts.edit import (
    EditError,
    alias_experts,
    permute_experts,
    protect_experts,
    replace_experts,
    replace_router,
    replace_routing,
    slice_experts,
)
from moec.experts.expert import (
    Activation,
    Affine,
    Banded,
    Constant,
    Dense,
    Expert,
    FeedForward,
    LowRank,
    Matrix,
    Offset,
    PartlyLowRank,
    Projection,
    Quantized,
)
from moec.experts.layer import MoeLayer, find_moe_layers, find_unreadable
from moec.experts.reading import UnreadableExpertError, load_expert
from moec.experts.run import LayerRun, route_inputs_of, run_layer

__all__ = [
    "Activation",
    "Affine",
    "Banded",
    "Constant",
    "Dense",
    "DenseLayer",
    "EditError",
    "Expert",
    "FeedForward",
    "LayerRun",
    "LowRank",
    "Matrix",
    "MoeLayer",
    "Offset",
    "PartlyLowRank",
    "Projection",
    "Quantized",
    "UnreadableExpertError",
    "alias_experts",
    "find_dense_layers",
    "find_moe_layers",
    "find_unreadable",
    "load_dense",
    "load_expert",
    "make_sparse",
    "permute_experts",
    "protect_experts",
    "replace_dense",
    "replace_experts",
    "replace_router",
    "replace_routing",
    "route_inputs_of",
    "run_layer",
    "slice_experts",
]
