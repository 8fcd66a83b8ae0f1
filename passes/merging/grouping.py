"""Which experts of a layer go together: a group is named by the expert that is its centre.

A grouping is a tuple with the centre of each expert; a centre is its own. Ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

Matrix = NDArray[np.float64]


def cosine(gram: Matrix) -> Matrix:
    """Cosines [E, E] from inner products [E, E]; 0 with a vector of zeros, 1 on the diagonal."""
    norms = np.sqrt(np.clip(np.diagonal(gram), 0, None))
    scale = np.where(norms > 0, norms, 1.0)
    result: Matrix = np.clip(gram / np.outer(scale, scale), -1.0, 1.0)
    np.fill_diagonal(result, 1.0)
    return result


def router_cosine(logit_gram: Matrix, outputs: Sequence[Sequence[int]]) -> Matrix:
    """(cos + 1) / 2 of the router logits of experts [E, E], over all tokens (M-SMoE, arXiv 2310.01334, section 3.2).

    `logit_gram` [R, R] is the sum of z z^T; `outputs` are the router outputs of each expert, whose logits are added.
    """
    members = np.zeros((len(outputs), logit_gram.shape[0]))
    for expert, mine in enumerate(outputs):
        members[expert, list(mine)] = 1.0
    return (cosine(members @ logit_gram @ members.T) + 1) / 2


def co_activation_distance(together: Matrix) -> Matrix:
    """Distance [E, E] in 0..1: experts that are chosen for the same tokens are near (STUN, arXiv 2409.06211).

    `together` [E, E] counts tokens that choose both, on the diagonal tokens that choose one.
    """
    return 1.0 - cosine(together)


def strongest_of(importance: Sequence[float], count: int, required: Collection[int] = ()) -> tuple[int, ...]:
    """The `count` most important experts in ascending order, `required` ones before all others."""
    ranked = sorted(range(len(importance)), key=lambda expert: (expert not in required, -importance[expert], expert))
    return tuple(sorted(ranked[:count]))


def join_nearest(similarity: Matrix, centres: Sequence[int], open_centres: Sequence[int]) -> tuple[int, ...]:
    """Every expert that is no centre joins the most similar one of `open_centres`."""
    grouping = list(range(similarity.shape[0]))
    for expert in set(grouping) - set(centres):
        grouping[expert] = max(open_centres, key=lambda centre: (similarity[expert, centre], -centre))
    return tuple(grouping)


def average_linkage(distance: Matrix, count: int, importance: Sequence[float]) -> tuple[int, ...]:
    """Exactly `count` groups by average linkage; the most important member is the centre."""
    size = distance.shape[0]
    groups: dict[int, list[int]] = {expert: [expert] for expert in range(size)}
    if size > count:
        condensed = squareform((distance + distance.T) / 2, checks=False)
        for step, (first, second) in enumerate(linkage(condensed, method="average")[: size - count, :2].astype(int)):
            groups[size + step] = groups.pop(int(first)) + groups.pop(int(second))
    return _with_centres(list(groups.values()), importance)


def spectral_groups(affinity: Matrix, count: int, importance: Sequence[float]) -> tuple[int, ...]:
    """`count` groups by the leading eigenvectors of the normalised affinity [E, E] (UNCURL, arXiv 2409.01483).

    Rows of the eigenvectors are clustered by k-means, which starts from the rows that lie farthest apart.
    """
    degrees = np.clip(affinity, 0, None).sum(axis=1)
    scale = 1.0 / np.sqrt(np.where(degrees > 0, degrees, 1.0))
    _, vectors = np.linalg.eigh(np.clip(affinity, 0, None) * np.outer(scale, scale))
    rows = vectors[:, ::-1][:, :count]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(norms > 0, norms, 1.0)
    # equal experts have equal rows but for rounding, which must not decide
    labels = _k_means(np.round(rows, 9), count)
    return _with_centres([list(np.flatnonzero(labels == label)) for label in range(count)], importance)


def random_groups(count: int, importance: Sequence[float], generator: np.random.Generator) -> tuple[int, ...]:
    """`count` groups by chance, of equal sizes as far as that is possible."""
    order = generator.permutation(len(importance))
    return _with_centres([[int(expert) for expert in order[first::count]] for first in range(count)], importance)


def _k_means(rows: Matrix, count: int, iterations: int = 100) -> NDArray[np.int64]:
    """Labels 0 .. count - 1, each of them used."""
    chosen = [0]
    while len(chosen) < count:
        distance = np.stack([((rows - rows[start]) ** 2).sum(axis=1) for start in chosen]).min(axis=0)
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
    centres, labels = rows[chosen], np.full(len(rows), -1)
    for _ in range(iterations):
        distance = ((rows[:, None, :] - centres[None]) ** 2).sum(axis=2)
        found = distance.argmin(axis=1)
        for label in range(count):
            if not (found == label).any():
                own = distance[np.arange(len(rows)), found]
                sizes = np.bincount(found, minlength=count)
                found[np.where(sizes[found] > 1, own, -1.0).argmax()] = label
        if (found == labels).all():
            break
        labels = found
        centres = np.stack([rows[labels == label].mean(axis=0) for label in range(count)])
    return labels


def _with_centres(groups: Sequence[Sequence[int]], importance: Sequence[float]) -> tuple[int, ...]:
    grouping = [0] * sum(map(len, groups))
    for group in groups:
        centre = min(group, key=lambda expert: (-importance[expert], expert))
        for expert in group:
            grouping[expert] = int(centre)
    return tuple(grouping)
