"""Merging of experts on tensors: neurons in rows, their alignment, groups of experts, and least squares afterwards."""

from moec.passes.merging.alignment import activation_profit, align, weight_profit
from moec.passes.merging.choices import (
    Alignment,
    Grouping,
    RouterChange,
    Selection,
    Weighting,
    experts_to_keep,
    global_choice,
    keep_problem,
    require_room,
)
from moec.passes.merging.facility import FacilityPlan, FacilityTable, solve_facility
from moec.passes.merging.grouping import (
    average_linkage,
    co_activation_distance,
    cosine,
    join_nearest,
    random_groups,
    router_cosine,
    spectral_groups,
    strongest_of,
)
from moec.passes.merging.least_squares import held_out_rows, mean_square, ridge_changes
from moec.passes.merging.neurons import NeuronTable, UnmergeableExpertError, merge_tables
from moec.passes.merging.planning import GroupedLayer, GroupingPlan, GroupingRequest, plan_groups
from moec.passes.merging.recombination import ClusterStart, Recombined, recombine, segment_directions
from moec.passes.merging.router_rows import join_router_outputs

__all__ = [
    "Alignment",
    "ClusterStart",
    "FacilityPlan",
    "FacilityTable",
    "GroupedLayer",
    "Grouping",
    "GroupingPlan",
    "GroupingRequest",
    "NeuronTable",
    "Recombined",
    "RouterChange",
    "Selection",
    "UnmergeableExpertError",
    "Weighting",
    "activation_profit",
    "align",
    "average_linkage",
    "co_activation_distance",
    "cosine",
    "experts_to_keep",
    "global_choice",
    "held_out_rows",
    "join_nearest",
    "join_router_outputs",
    "keep_problem",
    "mean_square",
    "merge_tables",
    "plan_groups",
    "random_groups",
    "recombine",
    "require_room",
    "ridge_changes",
    "router_cosine",
    "segment_directions",
    "solve_facility",
    "spectral_groups",
    "strongest_of",
    "weight_profit",
]
