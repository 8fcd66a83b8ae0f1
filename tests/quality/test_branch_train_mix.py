"""Fine-tunes of one model joined as experts: better over all kinds of text than the seed, and than their average."""

from __future__ import annotations

import pytest

from tests.quality.branch_train_mix import Losses, rows
from tests.quality.fine_tunes import KINDS


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Losses]:
    found = {row.subject: row for row in rows(tmp_path_factory.mktemp("fine-tunes"))}
    for row in found.values():
        print(row.subject, *[f"{value:.4f}" for value in (*row.nats, row.mean)])
    return found


@pytest.mark.slow
def test_each_fine_tune_is_the_best_on_its_own_text(losses: dict[str, Losses]) -> None:
    for number, kind in enumerate(KINDS):
        own = losses[f"fine-tune on {kind.name}"].nats[number]
        assert own < losses["seed"].nats[number]
        others = [losses[f"fine-tune on {other.name}"].nats[number] for other in KINDS if other is not kind]
        assert own < min(others)


@pytest.mark.slow
def test_experts_with_routers_by_text_beat_the_seed_and_the_average(losses: dict[str, Losses]) -> None:
    seed, mean = losses["seed"], losses["their average"]
    random, by_text = losses["btx, random router"], losses["btx, router by text"]
    assert all(joined < before + 0.03 for joined, before in zip(by_text.nats, seed.nats, strict=True))
    assert by_text.mean + 0.02 < random.mean < seed.mean
    assert by_text.mean + 0.02 < mean.mean


@pytest.mark.slow
def test_tuned_routers_are_no_worse_than_random_ones(losses: dict[str, Losses]) -> None:
    assert losses["btx, routers tuned"].mean < losses["btx, random router"].mean


@pytest.mark.slow
def test_fitted_shares_of_the_fine_tunes_beat_the_seed(losses: dict[str, Losses]) -> None:
    assert losses["expert merging"].mean < losses["seed"].mean
