"""Hugging Face checkpoints: `emit.emit_huggingface` writes a module as a folder that `from_pretrained` loads.

Reading order: `template` (transformers' model of a config, as IR), `matching` (pairs it with ours), `experts` with
`fill`, `sizes`, `fields` and `routing` (the config for other experts and routers), `hosts` (architectures with experts
for dense models that got some), `plan`; then `values` (the numbers of the parameters), `layout` (the tensors on disk),
`shards` and `emit`.
"""
