"""One budget for all: what becomes of each expert so that the model fits, and the loss grows least.

Reading order: `problem` is the choice as numbers, `lagrangian`, `dynamic_programming` and `milp` solve it, `solving`
picks and compares them; `actions` is what can be done to an expert, `tables` prices it, codes by `estimates` until
`pricing` makes those that could be chosen with `coding`; `plan` is the outcome.
"""
