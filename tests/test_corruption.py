"""Finetuning for editing: views whose visible tokens are partly wrong, drawn uniformly or by the model itself."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as plain
from test_sft import RECORDS, finetune, sft_config, untimed

from common.errors import UserError
from common.schema import OptimizerParams, SchedulerConfig, SFTTrainingConfig
from models import load_model
from models.family import find_family
from train.learner import make_learner
from train.network import Policy
from train.sft_trainer import check_corruption, rows_of
from train.views import Example, Layout, random_block_views

MASK, VOCABULARY, BLOCK = 7, 40, 4
RESPONSE = [10 + n % 20 for n in range(4001)]


def training_of(**keys: object) -> SFTTrainingConfig:
    return SFTTrainingConfig(**{"corrupt_p": 0.25, "lower_p": 0.0, "upper_p": 1.0, "post_num": 1} | keys)


def test_visible_tokens_are_replaced_and_all_of_them_predicted() -> None:
    example, layout = Example([1, 2, 3], RESPONSE, 3998), Layout(MASK, BLOCK, vocabulary=VOCABULARY)
    views = random_block_views(example, layout, training_of(corrupt_weight=0.5), np.random.default_rng(0))
    own, masked = views.response_index >= 0, views.inputs == MASK
    predictable = own & (views.response_index < 3999)
    assert (views.predict == predictable).all() and (views.targets[own] == RESPONSE).all()
    assert (views.inputs[~own] == [1, 2, 3]).all(), "the prompt's remainder stays as it is"
    wrong = (views.inputs != views.targets) & ~masked
    visible = predictable & ~masked
    assert not (wrong & ~visible).any(), "what lies behind the end is not corrupted"
    share = 0.25 * (1 - 1 / (VOCABULARY - 1))  # a uniform draw may be the right token
    assert wrong[visible].mean() == pytest.approx(share, abs=0.03) and 1500 < visible.sum() < 2500
    drawn = Counter(views.inputs[wrong].tolist())
    assert set(drawn) == set(range(VOCABULARY)) - {MASK} and max(drawn.values()) < 4 * min(drawn.values())
    assert (views.weight[masked] == 1).all() and (views.weight[visible] == 0.5).all()
    free = ~masked[1:-1].any(1)  # of whole blocks of four under t ~ U(0, 1): one in five
    assert free.mean() == pytest.approx(0.2, abs=0.05), "a view without masks is what an editor sees last"


def test_without_corruption_the_views_are_those_of_before() -> None:
    """The same random numbers in the same order, and nothing but masks predicted."""
    example, layout = Example([1, 2, 3], RESPONSE, 3998), Layout(MASK, BLOCK)
    views = random_block_views(example, layout, training_of(corrupt_p=0.0), np.random.default_rng(0))
    assert (views.predict.any(1)).all() and (views.inputs[views.predict] == MASK).all() and views.drafted is None


def test_the_model_draws_what_it_is_to_edit(tiny_sdar: Path) -> None:
    """Token by token the inverse CDF of its own distribution where masks stand for what is to be drawn."""
    loaded = load_model(tiny_sdar, "sdar")
    training = training_of(corrupt_p=0.6, corrupt_from="model")
    conversations = [[Example([5, 6, 8], [9, 10, 11, 12, 13], 5)], [Example([5, 6], [9, 14, 11, 12, 13, 3], 5)]]
    policy = Policy(loaded.model, loaded.mask_id)
    learner = make_learner(policy, OptimizerParams(), SchedulerConfig(), 1, training)
    rows = rows_of(training, loaded, conversations, np.random.default_rng(3), learner)

    rng = np.random.default_rng(3)
    layout = Layout(loaded.mask_id, BLOCK, vocabulary=loaded.model.config.vocab_size)
    views = [random_block_views(one[0], layout, training, rng) for one in conversations]
    uniform = iter(rng.uniform(size=sum(int(one.drafted.sum()) for one in views)).astype(np.float32))
    differs = 0
    for row, own, (example,) in zip(rows, views, conversations):
        assert (own.inputs[own.drafted] == loaded.mask_id).all() and not (own.drafted & ~own.predict).any()
        clean, found = [*example.prompt_ids, *example.response_ids], row.ids[row.view > 0].reshape(own.inputs.shape)
        assert (found[~own.drafted] == own.inputs[~own.drafted]).all()
        for view in range(len(own)):
            start = int(own.block[view]) * BLOCK
            with torch.no_grad():
                logits = plain.block_causal_logits(loaded.model, clean[:start] + own.inputs[view].tolist(), BLOCK)
            logits[:, loaded.mask_id] = -torch.inf
            for offset in np.flatnonzero(own.drafted[view]).tolist():
                cumulative = logits[start + offset].softmax(-1).cumsum(-1)
                token = int(torch.searchsorted(cumulative, torch.tensor(next(uniform))))
                assert found[view, offset] == token != loaded.mask_id
                differs += token != own.targets[view, offset]
    assert differs > 2 and next(uniform, None) is None


@pytest.mark.parametrize("source", ["uniform", "model"])
def test_a_model_learns_to_edit_and_its_config_says_so(source: str, tmp_path: Path) -> None:
    keys = {"training__max_steps": 2, "training__eval_every": 1, "dataset__eval_dataset": "''"}
    keys |= {"training__corrupt_p": 0.5, "training__corrupt_from": source, "dataset__validation_share": 0.3}
    target, rows = finetune(sft_config(tmp_path, RECORDS, **keys))
    assert json.loads((target / "config.json").read_text())["trained_to_edit"] is True
    assert load_model(target, "sdar").model.config.trained_to_edit is True
    assert all(row["eval/loss"] > 0 and row["predicted_tokens"] > 30 for row in rows)
    if source == "model":  # the drafts are in the noise that a resumed run goes on with
        first = sft_config(tmp_path, RECORDS, **keys, experiment__project="parts")
        first.training.max_steps = 1
        finetune(first)
        parts = sft_config(tmp_path, RECORDS, **keys, experiment__project="parts")
        parts.experiment.start_from_scratch = False
        assert untimed(finetune(parts)[1]) == untimed(rows)


def test_what_cannot_be_corrupted_is_refused(tmp_path: Path) -> None:
    for keys, line in (
        ({"method": "trace"}, r"training\.corrupt_p=0\.2 with training\.method=trace: only the views of semi-ar"),
        ({"loss_weight": "elbo"}, r"training\.loss_weight=elbo with training\.corrupt_p=0\.2"),
    ):
        changes = {"training__corrupt_p": 0.2} | {f"training__{key}": value for key, value in keys.items()}
        with pytest.raises(UserError, match=line):
            sft_config(tmp_path, RECORDS, **changes)
    with pytest.raises(UserError, match=r"training\.corrupt_p=0\.25: dream has full attention.*llada2, sdar"):
        check_corruption(training_of(), find_family("dream"))
