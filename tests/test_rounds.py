"""Units go in rounds: what was asked is reached, and a killed run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recovering import OPTIONS, SCHEDULE, counts_of, pico, rounds_of, rows_of, same, state

from prune_edit.decoder import Decoder
from prune_edit.planning import keep_neurons, keep_top
from prune_edit.recover import gradual as gradual_module
from prune_edit.recover.gradual import Schedule, gradual
from prune_edit.recover.least_squares import refit
from prune_edit.recover.shrink import shrink
from prune_edit.recover.tuning import Tuning
from prune_edit.scoring import METHODS
from prune_edit.workspace import Workspace

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


@pytest.mark.parametrize(("have", "target"), [(128, 6), (16, 1), (16, 15), (16, 16), (1024, 51)])
def test_a_schedule_goes_down_to_its_target(have: int, target: int) -> None:
    counts = Schedule().counts(have, target)
    assert counts[-1] == target
    assert counts == sorted(counts, reverse=True)
    assert all(count <= have for count in counts)
    assert counts[0] >= min(have - 1, target, round(0.55 * have)) or len(counts) == 1
    for more, fewer in zip([have, *counts], counts, strict=False):
        assert fewer >= 0.5 * more - 1, "no round takes much more than its share"


def test_rounds_of_least_squares_leave_one_fit_of_the_dense_weights() -> None:
    """Rounds choose the units; no fit of an earlier round is fitted again."""
    decoder, rows = pico("llama"), rows_of()
    schedule = replace(Schedule.of("least-squares"), scoring_examples=len(rows))
    found = gradual(rounds_of(decoder, rows, schedule=schedule), 6)
    assert len(schedule.counts(16, 6)) > 2
    kept = found.layout
    once = refit(shrink(decoder, kept.heads, kept.neurons, rows, OPTIONS), decoder, rows, OPTIONS)
    for (name, got), want in zip(
        found.model.state_dict().items(), once.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("method", ["cna-cases", "importance"])
def test_gradual_spares_the_neurons_of_other_layers(method: str) -> None:
    decoder = pico("llama-gqa")
    width = decoder.neuron_shape[1]
    rounds = rounds_of(decoder, rows_of(), method=method)
    free = gradual(rounds, 20, 16).layout.neurons
    assert len(free[0]) < width and sum(map(len, free)) == 16
    bound = gradual(replace(rounds, neuron_layers=(1, 2)), 20, 16).layout.neurons
    assert len(bound[0]) == width and sum(map(len, bound)) == 16


@pytest.mark.parametrize(
    ("name", "heads", "neurons"), [("llama-gqa", 7, 20), ("llama-gqa", 9, None), ("gpt2", 3, 100)]
)
def test_gradual_reaches_what_was_asked_and_goes_on_where_it_stopped(
    name: str,
    heads: int,
    neurons: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_of()
    work = Workspace(tmp_path / "work")

    def run() -> Decoder:
        return gradual(rounds_of(pico(name), rows, work), heads, neurons)

    total = pico(name)
    rounds = SCHEDULE.counts(counts_of(total)[0], heads)
    assert len(rounds) > 1
    first = run()
    assert counts_of(first) == (heads, counts_of(total)[1] if neurons is None else neurons)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {
        f"round-{i}.safetensors" for i in range(1, len(rounds) + 1)
    }
    calls: list[int] = []
    real = gradual_module.tune

    def watched(*args: Any, **kwargs: Any) -> Decoder:
        calls.append(args[3].seed)
        return real(*args, **kwargs)

    monkeypatch.setattr(gradual_module, "tune", watched)
    again = run()
    assert calls == [], "every round was there"
    assert again.layout == first.layout
    assert same(state(again), state(first))
    # Killed in the last round: only that one is run again, to the same end.
    (tmp_path / "work" / f"round-{len(rounds)}.safetensors").unlink()
    resumed = run()
    assert calls == [len(rounds)]
    assert same(state(resumed), state(first))
    # A file that was cut off is made again.
    path = tmp_path / "work" / f"round-{len(rounds)}.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert same(state(run()), state(first))
    assert calls == [len(rounds)] * 2


def test_gradual_leaves_the_dense_model_alone() -> None:
    decoder = pico("llama")
    before = state(decoder)
    gradual(rounds_of(decoder, rows_of()), 16)
    assert same(state(decoder), before)


def test_gradual_keeps_what_it_must() -> None:
    decoder = pico("llama")
    must = ((3,), (), (0,), (1, 2))
    scores = METHODS["random"](decoder, [], OPTIONS)[0]
    best = {divmod(int(unit), 4) for unit in scores.flatten().topk(4).indices}
    assert best != {(0, 3), (2, 0), (3, 1), (3, 2)}
    small = gradual(rounds_of(decoder, rows_of(), method="random", must_keep=must), 4)
    assert small.layout.heads == must


@pytest.mark.parametrize("recover", ["none", "mean", "least-squares"])
def test_rounds_without_tuning(recover: str, tmp_path: Path) -> None:
    dense, rows = pico("llama"), rows_of()
    work = Workspace(tmp_path / "work")
    schedule = Schedule.of(recover)
    small = gradual(rounds_of(dense, rows, work, schedule=schedule), 5, 20)
    assert counts_of(small) == (5, 20)
    rounds = len(schedule.counts(16, 5))
    assert len(list((tmp_path / "work").iterdir())) == rounds > 3
    means = None if recover == "none" else rows
    plain = shrink(dense, small.layout.heads, small.layout.neurons, means, OPTIONS)
    if recover == "none":
        assert same(state(small), state(plain))
    else:
        assert not same(state(small), state(plain)), "later rounds see what earlier ones left"


def test_while_tuning_a_score_counts_by_its_rank_within_its_layer() -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[6.0, 9.0, nan, 8.0], [4.0, -1.0, 5.0, nan], [nan, nan, nan, nan]])
    spread = gradual_module._spread(scores)
    want = torch.tensor([[2.0, 9.0, nan, 4.0], [2.0, -1.0, 5.0, nan], [nan, nan, nan, nan]])
    assert torch.equal(spread.nan_to_num(inf), want.nan_to_num(inf))
    # Ranked plainly, the first layer has all of the best three.
    assert keep_top(scores, 3) == ((0, 1, 3), (), ())
    assert keep_top(spread, 3) == ((1, 3), (2,), ())


def test_rounds_by_intervention_choose_neurons_by_it_too() -> None:
    decoder, rows = pico("llama"), rows_of()
    once = Schedule(0.5, final_tuning=Tuning(steps=0), scoring_examples=len(rows))
    small = gradual(rounds_of(decoder, rows, method="intervention", schedule=once), 8, 24)
    by_mean = replace(OPTIONS, ablation="mean")
    _, neurons = METHODS["intervention"](decoder, rows, by_mean)
    assert neurons.isfinite().all()
    assert small.layout.neurons == keep_neurons(neurons, 24)
