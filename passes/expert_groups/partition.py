"""Equal groups of experts such that experts which tokens choose together lie in different groups."""

from __future__ import annotations

import torch

Groups = tuple[tuple[int, ...], ...]


def lost_if_grouped_together(ids: torch.Tensor, gates: torch.Tensor, outputs: int) -> torch.Tensor:
    """[outputs, outputs] float64: the gate mass Σ min(g_a, g_b) of the tokens that chose both a and b.

    `ids` i64 and `gates` [tokens, slots]; a slot with gate 0 is empty. Where a group may be chosen once per token, this
    is what two of its experts lose to each other.
    """
    dense = gate_table(ids, gates, outputs)
    result = torch.zeros(outputs, outputs, dtype=torch.float64)
    for expert in range(outputs):
        chosen = dense[dense[:, expert] > 0]
        result[expert] = torch.minimum(chosen, chosen[:, expert, None]).sum(0)
    result.fill_diagonal_(0.0)
    return result


def gate_table(ids: torch.Tensor, gates: torch.Tensor, outputs: int) -> torch.Tensor:
    """[tokens, outputs] float64: the gate of each router output."""
    return torch.zeros(ids.shape[0], outputs, dtype=torch.float64).scatter_add_(1, ids, gates.to(torch.float64))


def lost_gate_mass(ids: torch.Tensor, gates: torch.Tensor, groups: Groups, per_group: int) -> float:
    """The share of the gate mass that tokens lose where each group may be chosen only `per_group` times.

    `ids` i64 and `gates` [tokens, slots] by falling choice, a slot with gate 0 is empty: a group's first slots stay.
    """
    group_of = torch.zeros(sum(map(len, groups)), dtype=torch.int64)
    for number, members in enumerate(groups):
        group_of[list(members)] = number
    used = gates > 0
    same = group_of[ids][:, :, None] == group_of[ids][:, None, :]
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(-1)
    before = (same & earlier & used[:, None, :]).sum(-1)
    mass = gates.to(torch.float64)
    total = float(mass.sum())
    return float(mass[used & (before >= per_group)].sum()) / total if total > 0 else 0.0


def balanced_partition(affinity: torch.Tensor, groups: int, generator: torch.Generator, *, starts: int = 8) -> Groups:
    """Equal groups with a small sum of `affinity` [n, n] (symmetric) inside; `groups` divides n.

    From random starts, the exchange of two members that helps most is made until none helps (Kernighan-Lin without its
    uphill moves); the best end is taken. Members are ascending, groups by their first member.
    """
    count = affinity.shape[0]
    best, least = torch.arange(count) // (count // groups), float("inf")
    for _ in range(starts):
        assignment = _exchange(affinity, random_assignment(count, groups, generator))
        inside = float(affinity[assignment[:, None] == assignment[None, :]].sum())
        if inside < least:
            best, least = assignment, inside
    return groups_of(best, groups)


def random_assignment(count: int, groups: int, generator: torch.Generator) -> torch.Tensor:
    """The group of each of `count` members, i64, equally many in each."""
    assignment = torch.empty(count, dtype=torch.int64)
    assignment[torch.randperm(count, generator=generator)] = torch.arange(count) // (count // groups)
    return assignment


def groups_of(assignment: torch.Tensor, groups: int) -> Groups:
    """The members of each group, ascending, and the groups by their first member."""
    members = [tuple(torch.nonzero(assignment == number).flatten().tolist()) for number in range(groups)]
    return tuple(sorted(members))


def _exchange(affinity: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    assignment = assignment.clone()
    groups = int(assignment.amax()) + 1
    tolerance = 1e-12 * float(affinity.abs().sum())
    while True:
        # to_group[a, g]: affinity of a to the members of group g
        to_group = affinity @ torch.nn.functional.one_hot(assignment, groups).to(affinity.dtype)
        own = to_group.gather(1, assignment[:, None])
        towards = to_group[:, assignment]  # [a, b]: of a to b's group
        gain = own + own.T - towards - towards.T + 2 * affinity
        gain = gain.masked_fill(assignment[:, None] == assignment[None, :], -torch.inf)
        first, second = divmod(int(gain.argmax()), gain.shape[1])
        # every exchange lowers the sum inside, so this ends; the tolerance keeps rounding from exchanging for ever
        if not float(gain[first, second]) > tolerance:
            return assignment
        assignment[[first, second]] = assignment[[second, first]]
