"""The numerics oracle: interprets IR on torch, one layer's weights at a time, differentiable, in float32 or float64.

Reading order: `symbols`, `element_types`, `weight_loader`, `frame`, `kernels` with `aten_kernel`, `large_weights`,
`nn_kernels`, `quant_kernel`, `route`, `experts`, then `plan` and `executor`. `layers` cuts a function into layers,
`agreement` compares what routers chose.
"""
