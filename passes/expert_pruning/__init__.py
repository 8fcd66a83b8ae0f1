"""Which experts a layer can do without: scores from calibration, and searches for the best subset."""

from moec.passes.expert_pruning.scores import Criterion, expert_scores
from moec.passes.expert_pruning.subset import best_subset, greedy_scores, leave_one_out

__all__ = ["Criterion", "best_subset", "expert_scores", "greedy_scores", "leave_one_out"]
