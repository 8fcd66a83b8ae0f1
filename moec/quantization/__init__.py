"""Packed weights in numbers: how matrices become codes, and codes matrices again. The formats are in `dialects.quant`.

Reading order: `packing` (codes in bytes), `small_floats`, `dictionary` (trits as a stream of codes), `packed` (a packed
matrix and what it stands for: the semantics of `quant.dequant`), `grids` (the codes of given numbers), `codebooks`,
`rounding` (whole matrices to the nearest codes).
"""
