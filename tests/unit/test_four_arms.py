"""The decoder that is trained four ways: its experts, what its arms share, its report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from examples.four_arms import report, train
from examples.four_arms.arms import ARMS, EXPERTS
from examples.four_arms.experts import sorted_experts
from examples.four_arms.model import CONTEXT, LAYERS, Decoder
from load_controller import policy

ARGUMENTS = argparse.Namespace(tokens=2 * train.WINDOWS_A_STEP * CONTEXT, rate=0.006)


@pytest.fixture(autouse=True)
def _a_short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = torch.randint(1, 256, (40 * CONTEXT + 1,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(train.corpus, "load", lambda held_out: stream.to(torch.uint8))


def _experts(experts: int = 4, tokens: int = 7) -> list[torch.Tensor]:
    """x, scores, W13 and W2 in double precision; nobody chooses expert 2."""
    chance = torch.Generator().manual_seed(1)
    shapes = [(tokens, 6), (tokens, experts), (experts, 6, 10), (experts, 5, 6)]
    x_TD, scores_TE, w13_EDG, w2_EFD = (
        torch.randn(*shape, generator=chance, dtype=torch.float64) for shape in shapes
    )
    scores_TE[:, 2] = -9.0
    return [
        each.requires_grad_() for each in (x_TD, scores_TE.softmax(1).detach(), w13_EDG, w2_EFD)
    ]


def _combined(
    x_TD: torch.Tensor, scores_TE: torch.Tensor, w13_EDG: torch.Tensor, w2_EFD: torch.Tensor
) -> torch.Tensor:
    ids_TK = scores_TE.detach().topk(2).indices
    return sorted_experts(x_TD, ids_TK, scores_TE.gather(1, ids_TK), w13_EDG, w2_EFD)[0]


def test_sorted_experts_compute_what_each_token_by_itself_would() -> None:
    x_TD, scores_TE, w13_EDG, w2_EFD = _experts()
    expected = torch.zeros_like(x_TD)
    for token, (scores_E, x_D) in enumerate(zip(scores_TE, x_TD, strict=True)):
        for expert in scores_E.topk(2).indices.tolist():
            a_F, b_F = (x_D @ w13_EDG[expert]).chunk(2)
            expected[token] += scores_E[expert] * ((silu(a_F) * b_F) @ w2_EFD[expert])

    y_TD = _combined(x_TD, scores_TE, w13_EDG, w2_EFD)

    torch.testing.assert_close(y_TD, expected)


def test_gradients_of_sorted_experts_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(_combined, tuple(_experts()))


def test_an_expert_that_nobody_chose_has_a_gradient_of_zeros() -> None:
    x_TD, scores_TE, w13_EDG, w2_EFD = _experts()

    _combined(x_TD, scores_TE, w13_EDG, w2_EFD).sum().backward()

    assert w13_EDG.grad is not None
    assert w13_EDG.grad[2].eq(0).all()
    assert w13_EDG.grad[1].ne(0).any()


def test_arms_of_one_seed_start_from_the_same_weights_and_seeds_do_not() -> None:
    starts = [Decoder(arm, seed=0).state_dict() for arm in ARMS.values()]

    for start in starts[1:]:
        assert all(torch.equal(start[name], weight) for name, weight in starts[0].items())
    assert not torch.equal(starts[0]["head"], Decoder(ARMS["none"], seed=1).head)


def test_a_decoder_does_not_look_ahead() -> None:
    model, ids_BS = Decoder(ARMS["loss_free"], seed=0), torch.randint(0, 256, (2, CONTEXT))
    changed_BS = ids_BS.clone()
    changed_BS[:, 60:] = 0

    with torch.no_grad():
        before, after = model(ids_BS).logits_BSV, model(changed_BS).logits_BSV

    torch.testing.assert_close(before[:, :60], after[:, :60])
    assert not torch.allclose(before[:, 60:], after[:, 60:])


@pytest.mark.parametrize("name", ARMS)
def test_only_the_loss_free_arm_moves_its_bias_and_does_it_by_the_policy_that_serves(
    name: str,
) -> None:
    model = Decoder(ARMS[name], seed=0)
    batch = torch.randint(1, 256, (4, CONTEXT + 1), generator=torch.Generator().manual_seed(2))

    _, counts_LE = train.train_step(model, train.optimizer(model, 0.006), batch)

    rate = 0.001 if name == "loss_free" else 0.0
    for layer, counts_E in zip(model.layers, counts_LE, strict=True):
        assert torch.equal(layer.bias, policy.sign(torch.zeros(EXPERTS), counts_E, rate))
        assert int(counts_E.sum()) == 4 * CONTEXT * 2


@pytest.mark.parametrize("name", ["gshard", "sigmoid_aux"])
def test_an_auxiliary_loss_reaches_the_gate(name: str) -> None:
    model = Decoder(ARMS[name], seed=0)

    model(torch.randint(1, 256, (2, CONTEXT))).loss.backward()

    assert all(layer.gate.grad.ne(0).any() for layer in model.layers)


def test_a_series_that_was_interrupted_trains_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "train",
        "--out",
        str(tmp_path),
        "--tokens",
        "8192",
        "--seeds",
        "2",
        "--arms",
        "none",
    ]
    monkeypatch.setattr(sys, "argv", command)
    kept = tmp_path / "none-0.json"
    kept.write_text("ended before")

    train.main()

    assert kept.read_text() == "ended before"
    assert json.loads((tmp_path / "none-1.json").read_text())["tokens"] == 8192
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


def test_the_report_has_a_row_for_each_arm_that_ended_and_names_what_is_missing(
    tmp_path: Path,
) -> None:
    for name, seed in (("none", 0), ("loss_free", 0), ("sigmoid_aux", 0)):
        result = train.train(name, seed, ARGUMENTS)
        (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(result))

    by_arm = report.read_runs(tmp_path)
    page = report.markdown(by_arm)

    assert list(by_arm) == ["sigmoid_aux", "loss_free", "none"]
    assert "| sigmoid, loss-free bias | 1 |" in page
    assert "| 9.50 / 0.04 |" in page
    assert "Missing: gshard with seed 0, gshard with seed 1" in page
    assert len(by_arm["none"][0].maxvio) == 2
    assert "seed by seed: more even in" in page


def test_held_out_balance_is_measured_over_all_windows_and_per_batch() -> None:
    model = Decoder(ARMS["none"], seed=0)
    windows = train.corpus.windows(train.corpus.load(held_out=True), CONTEXT)

    whole = train.measure(model, windows)

    first = train.measure(model, windows[: train.WINDOWS_A_STEP])
    assert len(whole.maxvio_global) == LAYERS
    assert whole.maxvio_batch == pytest.approx(first.maxvio_batch)
    assert first.maxvio_batch == pytest.approx(sum(first.maxvio_global) / LAYERS)
    assert whole.nats_per_byte == pytest.approx(5.5, abs=0.5)  # ln 256, for it has learned nothing


def test_a_page_gets_new_figures_between_its_markers_and_keeps_the_rest() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"

    assert report.between_markers(page, "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="the page has no"):
        report.between_markers("before\n", "new")
