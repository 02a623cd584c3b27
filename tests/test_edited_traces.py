"""Traces with edits and revocations: their views, and everything that a position's several predictions go through."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as plain
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import scored

from common.errors import UserError
from common.schema import RLTrainingConfig, Sampling
from common.trajectory import Request, Trajectory, Writing
from models import find_family, load_network
from sample.engine import Engine
from train import rl_step
from train.learner import Learner, batch_logp
from train.network import Policy
from train.objectives import Tokens, importance_weights, response_lengths, terms_of, tokens_of, value_targets
from train.packing import make_rows, pack
from train.rl_step import learn, sample_rows
from train.views import Layout, Views, join_views, random_views, trace_views

MASK, VOCABULARY, BLOCK = 7, 40, 4
GOLDEN = Path(__file__).parent / "golden" / "sdar"


def by_hand() -> Trajectory:
    """Prompt 1 2, response a…f in blocks of four: b is edited, e is edited, f is revoked and written again."""
    one = plain.random_trajectory(np.random.default_rng(0), 2, 2, BLOCK, VOCABULARY, MASK)
    one.prompt_ids, one.response_ids, one.length = [1, 2], [10, 11, 12, 13, 14, 15], 6
    one.step_map, one.logp = [0, 1, 2, 3, 4, 4], [-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]
    #                b first                     e first                     f first
    one.overwritten = [Writing(0, 1, 21, -1.1), Writing(2, 4, 24, -1.2), Writing(2, 5, 25, -1.3)]
    one.overwritten.append(Writing(3, 5, MASK, 0.0))  # f is revoked
    return one


def as_plain(views: Views, block_size: int | None, prompt: int) -> list[plain.PlainView]:
    """The views in the reference's words."""
    found = []
    for n in range(len(views)):
        offsets = np.flatnonzero(views.predict[n])
        columns = [values[n][offsets].tolist() for values in (views.targets, views.response_index, views.step)]
        start = int(views.block[n]) * block_size if block_size else prompt
        found.append(plain.PlainView(start, views.inputs[n].tolist(), offsets.tolist(), *columns))
    return found


def test_views_worked_out_by_hand() -> None:
    views = trace_views(by_hand(), Layout(MASK, BLOCK))
    assert [(view.tokens, view.response_indices, view.targets) for view in as_plain(views, BLOCK, 2)] == [
        ([1, 2, MASK, MASK], [0, 1], [10, 21]),
        ([1, 2, 10, 21], [1], [11]),  # an edit: its own old token is what it sees
        ([MASK, MASK, MASK, MASK], [2, 4, 5], [12, 24, 25]),
        ([12, MASK, 24, 25], [3], [13]),  # f is revoked here, which nobody predicts
        ([12, 13, 24, MASK], [4, 5], [14, 15]),
    ]
    assert views.writing[views.predict].tolist() == [-1, 0, -1, -1, 1, 2, -1, -1, -1]


def test_merged_views_worked_out_by_hand() -> None:
    """The canvas is that before the first of the steps; of a position written twice within them the last token."""
    views = as_plain(trace_views(by_hand(), Layout(MASK, BLOCK), shrink=2), BLOCK, 2)
    assert [(view.tokens, view.response_indices, view.targets) for view in views] == [
        ([1, 2, MASK, MASK], [0, 1], [10, 11]),
        ([MASK, MASK, MASK, MASK], [2, 3, 4, 5], [12, 13, 24, 25]),  # f's revocation is no token
        ([12, 13, 24, MASK], [4, 5], [14, 15]),
    ]
    assert [view.steps[0] for view in views] == [0, 2, 4]
    (whole,) = as_plain(trace_views(by_hand(), Layout(MASK, None), shrink=9), None, 2)
    assert whole.tokens == [MASK] * 6 and whole.targets == by_hand().response_ids


def test_a_revocation_alone_is_no_step_and_may_be_the_last_word() -> None:
    """Then the position is a mask in the end: it is in no view a target, be it of the trace or at random."""
    trajectory = by_hand()
    trajectory.overwritten = [*trajectory.overwritten[:2], Writing(2, 5, 25, -1.3)]
    trajectory.step_map = [0, 1, 2, 3, 4, 5]
    trajectory.response_ids[5] = MASK
    views = as_plain(trace_views(trajectory, Layout(MASK, BLOCK)), BLOCK, 2)
    assert [view.steps[0] for view in views] == [0, 1, 2, 3, 4]
    assert views[-1].tokens == [12, 13, 24, 25] and views[-1].targets == [14]
    noised = random_views(trajectory, Layout(MASK, BLOCK), RLTrainingConfig(lower_p=1.0, upper_p=1.0), rng(0))
    assert sorted(noised.response_index[noised.predict].tolist()) == [0, 1, 2, 3, 4]


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.sampled_from([0, 3]), st.sampled_from([2, 4, 8, None]))
def test_views_equal_the_loops(seed: int, shrink: int, post_num: int, block_size: int | None) -> None:
    start = plain.random_trajectory(rng(seed), 1 + seed % 11, 1 + seed % 3, block_size or 4, VOCABULARY, MASK)
    trajectory = plain.edited_trajectory(rng(seed), start, block_size, VOCABULARY, MASK)
    views = trace_views(trajectory, Layout(MASK, block_size), shrink, post_num)
    wanted = plain.trace_views(trajectory, block_size, MASK, shrink, post_num)
    assert as_plain(views, block_size, len(trajectory.prompt_ids)) == wanted
    rows = make_rows(0, trajectory.prompt_ids, trajectory.response_ids, views)
    recorded = [value for view in wanted for value in view.recorded]
    assert tokens_of(rows, [scored(trajectory)]).engine_logp.tolist() == pytest.approx(recorded)
    if shrink == 1 and post_num:
        end = min(trajectory.length + post_num, len(trajectory.response_ids))
        written = [one for one in trajectory.overwritten if one.token != MASK and one.position < end]
        assert len(recorded) == len(written) + end, "every token that was drawn is predicted once"


def test_traces_of_several_turns_are_joined() -> None:
    views = trace_views(by_hand(), Layout(MASK, BLOCK))
    assert join_views([views, views]).writing.tolist() == [*views.writing.tolist(), *views.writing.tolist()]


# ---- the sampler's numbers


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_network(GOLDEN, "sdar")


@pytest.fixture(scope="module")
def drawn(model: torch.nn.Module) -> list[Trajectory]:
    """Responses that a plain loop drew, one canvas after another, with the logp of every writing."""
    mask_id, vocabulary = model.config.mask_token_id, model.config.vocab_size
    allowed = torch.arange(vocabulary) != mask_id

    def logp(canvas: list[int], position: int, token: int) -> float:
        with torch.no_grad():
            row = plain.block_causal_logits(model, canvas, BLOCK)[position] / 0.8
        return float(row[token] - row[allowed].logsumexp(-1))

    found = []
    for seed, prompt in enumerate((5, 8, 2)):
        start = plain.random_trajectory(rng(seed), prompt, 3, BLOCK, vocabulary, mask_id)
        one = plain.edited_trajectory(rng(seed), start, BLOCK, vocabulary, mask_id, logp)
        one.temperature, one.length = 0.8, len(one.response_ids) - 1
        found.append(one)
    assert all(one.overwritten for one in found) and any(w.token == mask_id for one in found for w in one.overwritten)
    return found


def learner_of(model: torch.nn.Module) -> Learner:
    optimizer = plain.RecordingSGD(list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Learner(Policy(model, model.config.mask_token_id), optimizer, scheduler, Accelerator(), 1e9)


def test_the_trainer_s_numbers_are_the_sampler_s(model: torch.nn.Module, drawn: list[Trajectory]) -> None:
    samples = [scored(one, (-1.0) ** n) for n, one in enumerate(drawn)]
    layout = Layout(model.config.mask_token_id, BLOCK)
    rows = sample_rows(samples, RLTrainingConfig(post_num=BLOCK), layout, [0])
    tokens = tokens_of(rows, samples)
    found = batch_logp(learner_of(model), pack(rows, 200), 0.8)
    assert len(found) == sum(len(one.response_ids) for one in drawn) + sum(
        writing.token != layout.mask_id for one in drawn for writing in one.overwritten
    )
    torch.testing.assert_close(found, tokens.engine_logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings_of_draw"),
    [
        ("sdar", {"remasking_strategy": "edit", "dynamic_threshold": 0.05, "edit_threshold": 0.1, "max_edit_steps": 3}),
        ("sdar", {"remasking_strategy": "edit", "dynamic_threshold": 0.05, "edit_threshold": 0.0, "temperature": 0.0}),
        ("sdar", {"remasking_strategy": "revoke", "dynamic_threshold": 0.1, "revoke_threshold": 1.0}),
        ("dream", {"remasking_strategy": "revoke", "dynamic_threshold": 0.1, "revoke_threshold": 1.0}),
    ],
    ids=["edit", "edit greedily", "revoke", "revoke under full attention"],
)
def test_the_trainer_s_numbers_are_the_engine_s(family: str, settings_of_draw: dict) -> None:
    network, attention = load_network(GOLDEN.parent / family, family), find_family(family)
    mask_id, vocabulary = network.config.mask_token_id, network.config.vocab_size
    requests = [Request(str(n), rng(n).integers(0, vocabulary - 8, 3 + n).tolist(), seed=5) for n in range(4)]
    drawn = Sampling(**{"block_size": 8, "max_token": 16, "steps": 16, "temperature": 1.0} | settings_of_draw)
    samples = [scored(one, 1.0) for one in Engine(network, mask_id, ()).generate(requests, drawn)]
    writings = [writing for one in samples for writing in one.trajectory.overwritten]
    assert len(writings) > 4 and {one.token == mask_id for one in writings} == {
        False,
        "revoke" in settings_of_draw.values(),
    }
    layout = Layout(mask_id, 8 if attention.attention == "block" else None, attention.logit_offset)
    rows = sample_rows(samples, RLTrainingConfig(post_num=16), layout, [0])
    found = batch_logp(learner_of(network), pack(rows, 300), samples[0].trajectory.temperature)
    torch.testing.assert_close(found, tokens_of(rows, samples).engine_logp, rtol=0, atol=1e-5)
    assert len(found) == sum(len(one.trajectory.response_ids) for one in samples) + sum(
        one.token != mask_id for one in writings
    )


@pytest.mark.parametrize(
    "keys", [{}, {"method": "random_masking", "mismatch_views": 1000}, {"shrink": 2, "tis_cap": 2.0}], ids=str
)
def test_a_wrong_number_of_an_overwritten_token_is_seen(
    model: torch.nn.Module, drawn: list[Trajectory], keys: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the method: the replay that measures the mismatch, here of all views, goes over every writing."""
    monkeypatch.setattr(rl_step, "MISMATCH_SHARE", 1000)
    layout, training = Layout(model.config.mask_token_id, BLOCK), RLTrainingConfig(**keys)
    samples = [scored(one, (-1.0) ** n) for n, one in enumerate(drawn)]
    figures = learn(learner_of(model), samples, training, layout, 20, [0], exact=True)
    assert figures["updates"] == 1 and figures["logp_diff_max"] <= 1e-5
    assert figures.get("tis_weight", 1.0) == pytest.approx(1.0, abs=1e-5)
    wrong = replace(drawn[0], overwritten=[one._replace(logp=one.logp - 1) for one in drawn[0].overwritten])
    with pytest.raises(UserError, match=r"logp_diff_max 1\.00e\+00 before the first update"):
        learn(learner_of(model), [scored(wrong, 1.0), *samples[1:]], training, layout, 20, [0], exact=True)


# ---- several predictions of one position


def tokens_by_hand() -> tuple[Tokens, list]:
    """The predictions of `by_hand`, view by view: 0 1', 1, 2 4' 5', 3, 4 5 (′: overwritten later)."""
    samples = [scored(by_hand(), 1.0, reward=2.0, token_rewards=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])]
    return tokens_of(sample_rows(samples, RLTrainingConfig(), Layout(MASK, BLOCK), [0]), samples), samples


def test_a_term_is_of_one_written_token() -> None:
    tokens, _ = tokens_by_hand()
    assert tokens.engine_logp.tolist() == pytest.approx([-0.1, -1.1, -0.2, -0.3, -1.2, -1.3, -0.4, -0.5, -0.6])
    term, coefficient, share = terms_of(tokens, RLTrainingConfig(term="position"))
    assert sorted(term.tolist()) == list(range(9)) and coefficient.tolist() == share.tolist() == [1.0] * 9
    term, coefficient, _ = terms_of(tokens, RLTrainingConfig(term="sequence"))
    assert set(term.tolist()) == {0} and coefficient.tolist() == pytest.approx([1 / 9] * 9)
    assert response_lengths(tokens).tolist() == [9], "length times mean is the sum over the trace"


def test_a_weight_is_of_one_written_token() -> None:
    """The views that are trained may be merged or random: each takes the weight of the very token it predicts."""
    replayed, samples = tokens_by_hand()
    replayed.trainer_logp = replayed.engine_logp + torch.tensor(range(9)) / 10
    merged = tokens_of(sample_rows(samples, RLTrainingConfig(shrink=2), Layout(MASK, BLOCK), [0]), samples)
    assert merged.writing.tolist() == [-1, -1, -1, -1, 1, 2, -1, -1]  # 0 1, 2 3 4' 5', 4 5
    wanted = np.exp(np.array([0, 2, 3, 6, 4, 5, 7, 8]) / 10)
    assert importance_weights(merged, replayed, 9.0, False).tolist() == pytest.approx(wanted.tolist(), rel=1e-5)


def test_rewards_lie_on_the_last_writing_and_advantages_on_all() -> None:
    """Process rewards are of the text as it is in the end; what was overwritten earns what came after."""
    tokens, samples = tokens_by_hand()
    tokens.old_value = torch.zeros(9)
    _, returns = value_targets(tokens, samples, RLTrainingConfig(gam=1.0, lam=1.0), BLOCK)
    step = {0: (1 + 0) / 2, 1: 2, 2: (3 + 0 + 0) / 3, 3: 4, 4: (5 + 6) / 2}  # means over the predicted sets
    after = [sum(step[t] for t in range(now + 1, 5)) for now in range(5)]
    own = [(0, 1), (0, 0), (1, 2), (2, 3), (2, 0), (2, 0), (3, 4), (4, 5), (4, 6)]  # (step, reward)
    assert returns.tolist() == pytest.approx([reward + after[now] for now, reward in own])
    samples[0].score = scored(by_hand(), reward=2.0).score
    _, returns = value_targets(tokens, samples, RLTrainingConfig(gam=0.5), BLOCK)
    assert returns.tolist() == pytest.approx([2 * 0.5 ** (4 - now) for now, _ in own]), "an outcome's: the last step's"
