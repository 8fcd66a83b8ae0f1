"""Merging of experts on tensors: neurons in rows, their alignment, groups of experts, and least squares afterwards."""

from moec.passes.merging.alignment import activation_profit, align, weight_profit
from moec.passes.merging.facility import FacilityPlan, FacilityTable, solve_facility
from moec.passes.merging.grouping import (
    average_linkage,
    co_activation_distance,
    cosine,
    join_nearest,
    router_cosine,
    spectral_groups,
    strongest_of,
)
from moec.passes.merging.least_squares import held_out_rows, mean_square, ridge_change
from moec.passes.merging.neurons import NeuronTable, UnmergeableExpertError, merge_tables
from moec.passes.merging.recombination import ClusterStart, Recombined, recombine, segment_directions

__all__ = [
    "ClusterStart",
    "FacilityPlan",
    "FacilityTable",
    "NeuronTable",
    "Recombined",
    "UnmergeableExpertError",
    "activation_profit",
    "align",
    "average_linkage",
    "co_activation_distance",
    "cosine",
    "held_out_rows",
    "join_nearest",
    "mean_square",
    "merge_tables",
    "recombine",
    "ridge_change",
    "router_cosine",
    "segment_directions",
    "solve_facility",
    "spectral_groups",
    "strongest_of",
    "weight_profit",
]
