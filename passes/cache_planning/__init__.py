"""Caches of experts in numbers: `simulation` (hit rates of policies), `prediction` (who comes next)."""
