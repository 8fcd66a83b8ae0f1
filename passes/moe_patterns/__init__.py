"""How router arithmetic is read as one `Routing`, and how the reading is checked."""

from moec.passes.moe_patterns.check import RouterCheck
from moec.passes.moe_patterns.reading import RouterReading, UnreadableRouterError, read_router

__all__ = ["RouterCheck", "RouterReading", "UnreadableRouterError", "read_router"]
