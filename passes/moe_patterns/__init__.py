"""How router arithmetic is read as one `Routing`, and how the reading is checked."""

from moec.passes.moe_patterns.check import RouterCheck
from moec.passes.moe_patterns.dense_experts import DenseExperts, find_dense_experts, make_sparse
from moec.passes.moe_patterns.reading import RouterReading, UnreadableRouterError, read_router

__all__ = [
    "DenseExperts",
    "RouterCheck",
    "RouterReading",
    "UnreadableRouterError",
    "find_dense_experts",
    "make_sparse",
    "read_router",
]
