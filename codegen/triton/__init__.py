"""Triton kernels for the experts of a module: a Python package that needs torch, triton and safetensors alone.

Reading order: `spec` says what a kind of layer is, `reading` finds it in the IR or refuses it with a reason, `beside`
finds shared experts, `parts` cuts experts into what slots name, `router_path` and `activation` spell functions,
`formats`, `widening` and `packing` lay weights out, `rendering` fills the templates, `tiles` chooses sizes of blocks,
`emit` writes the package, `running` runs it, on a GPU or in Triton's interpreter.
"""
