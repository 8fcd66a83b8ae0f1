"""What passes learn from text: one walk through the model, layer by layer, and what it leaves behind.

Reading order: `data` makes sequences of tokens, `statistics` and `sample` are what is kept of a layer, `walk` gathers
it, `gradients` walks back, `calibration` keeps and recalls it; `second_moments` and `all_experts` compute what is
larger from the sample.
"""
