"""Parts of `fold-norms`: linear maps wherever they stand, per-channel factors between them, the residual stream."""
