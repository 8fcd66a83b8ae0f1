"""The operations, one file per dialect. Importing this package registers all of them.

Reading order: `builtin` (module, function, weight, constant), `aten` (what torch.export gives), `nn` (what patterns
raise from it), `moe` (routing and experts), `quant` (packed weights).
"""

from moec.dialects import aten, builtin, moe, nn, quant

__all__ = ["aten", "builtin", "moe", "nn", "quant"]
