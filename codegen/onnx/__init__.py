"""ONNX: `emit.emit_onnx` writes a module as a model with external weights.

Reading order: `targets`, `graph` with `external_data`, `context`, `registry`; then the emissions: `aten_pointwise`,
`aten_shape`, `aten_reduce`, `aten_matrix`, `lower_nn`, `route`, `lower_moe`. Experts: `expert_products` (what a body
multiplies), `expert_body`, `experts_lean`, `functions` with `lean_function`, `expert_form` (what the fused operator can
compute), `experts_fused` with `fallback_function`, `shared_experts`, `parity`, `cost_model`, `expert_plan`. Packed
weights: `packed`, `lower_quant`, `experts_loop`, `experts_packed_fused` with `packed_parity`, `packed_cost`. Last
`emit`, `deploy_files` and `session_file`.
"""
