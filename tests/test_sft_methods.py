"""Every method of finetuning: its loss and gradient against the plain ones, packed in every way; the ELBO's weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as plain
from accelerate import Accelerator

from common.errors import UserError
from common.schema import SFTTrainingConfig
from common.trajectory import Writing
from models import LoadedModel, load_network
from models.family import find_family
from train import sft_trainer
from train.learner import Learner
from train.network import Policy
from train.packing import PackedBatch, Row, fill_lines, pack
from train.sft_data import Conversation
from train.views import SFT_METHODS, Example, Layout, layout_of, next_token_views

GOLDEN = Path(__file__).resolve().parent / "golden"
METHODS = {
    "sdar": ("semi-ar", "trace"),
    "dream": ("semi-ar", "random_masking", "trace", "ar"),
    "llada": ("semi-ar", "random_masking", "trace"),
    "mmada": ("random_masking",),
}
CASES = [(family, method, "none") for family, methods in METHODS.items() for method in methods]
CASES += [("sdar", "semi-ar", "elbo"), ("llada", "random_masking", "elbo"), ("dream", "semi-ar", "elbo")]
CASES += [("sdar", "semi-ar", "corrupt")]
BLOCK, CANVAS = 4, 12


@pytest.fixture(scope="module")
def golden() -> dict[str, LoadedModel]:
    loaded = {}
    for family in METHODS:
        model = load_network(GOLDEN / family, family)
        loaded[family] = LoadedModel(model, None, find_family(family), model.config.mask_token_id, ())
    return loaded


def some_conversations(loaded: LoadedModel, seed: int = 5) -> list[Conversation]:
    """Examples of mixed lengths, filled up as the family's attention asks, unmasked and edited in a random order."""
    rng = np.random.default_rng(seed)
    vocabulary, mask_id = loaded.model.config.vocab_size, loaded.mask_id
    tokens = [token for token in range(vocabulary) if token != mask_id]
    conversations = []
    for prompt_length, length in ((5, 3), (8, 4), (3, 9), (1, 1), (2, 12)):
        size = CANVAS
        if loaded.family.attention == "block":
            size = length + -(prompt_length + length) % BLOCK
        prompt = rng.choice(tokens, prompt_length).tolist()
        response = rng.choice(tokens, size).tolist()
        steps = rng.integers(0, 5, length).tolist() + [-1] * (size - length)
        overwritten = [
            Writing(step - 1, n, int(rng.choice([*tokens, mask_id])), 0.0)
            for n, step in enumerate(steps)
            if step > 0 and rng.random() < 0.5
        ]
        conversations.append([Example(prompt, response, length, steps, overwritten)])
    return conversations


def plain_loss(
    loaded: LoadedModel, training: SFTTrainingConfig, conversations: Sequence[Conversation], rng: np.random.Generator
) -> torch.Tensor:
    """One forward per view with all its logits; the weighted mean as DESIGN has it."""
    method, family = SFT_METHODS[loaded.family.attention][training.method], loaded.family
    total, predicted, predictable, weighs = torch.zeros(()), 0, 0, training.loss_weight == "elbo" or training.corrupt_p
    for example in (example for conversation in conversations for example in conversation):
        views = method(example, layout_of(loaded, BLOCK), training, rng)
        prompt, whole = len(example.prompt_ids), example.prompt_ids + example.response_ids
        for view in range(len(views)):
            if family.attention == "block":
                start = int(views.block[view]) * BLOCK
                logits = plain.block_causal_logits(loaded.model, whole[:start] + views.inputs[view].tolist(), BLOCK)
            else:
                start, ids = prompt, example.prompt_ids + views.inputs[view].tolist()
                block = 1 if training.method == "ar" else len(ids)
                logits = plain.block_causal_logits(loaded.model, ids, block)
            allowed = torch.arange(logits.shape[-1]) != loaded.mask_id
            for offset in np.flatnonzero(views.predict[view]).tolist():
                row = logits[start + offset + family.logit_offset]
                logp = row[views.targets[view, offset]] - row[allowed].logsumexp(-1)
                weight = views.weight[view, offset] if weighs else 1
                total = total - logp * weight
                predicted += weight if training.corrupt_p else 1
        predictable += min(example.length + training.post_num, len(example.response_ids))
    return total / (predictable * training.mask_times_per_sample if training.loss_weight == "elbo" else predicted)


def learner_of(loaded: LoadedModel) -> tuple[Learner, dict[str, torch.Tensor]]:
    """A learner that does not learn, and where its gradients are put."""
    found: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in loaded.model.named_parameters()})
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Learner(Policy(loaded.model, loaded.mask_id), optimizer, scheduler, Accelerator(), 1e9), found


PACKINGS = {
    "one by one": lambda rows: pack(rows, 1),
    "side by side": lambda rows: pack(rows, 10**6),
    "little padding": lambda rows: pack(rows, 10**6, most_padding=0.1),
    "joined": lambda rows: pack(rows, 90, together=True),
    "all joined": lambda rows: pack(rows, 10**6, together=True),
}


@pytest.mark.parametrize(("family", "method", "loss_weight"), CASES)
def test_loss_and_gradient_equal_the_reference(
    golden: dict[str, LoadedModel], family: str, method: str, loss_weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = golden[family]
    weights = {"corrupt_p": 0.5, "corrupt_weight": 0.3} if loss_weight == "corrupt" else {"loss_weight": loss_weight}
    training = SFTTrainingConfig(method=method, block_size=BLOCK, post_num=1, shrink=2, **weights)
    conversations = some_conversations(loaded)
    loaded.model.zero_grad()
    wanted = plain_loss(loaded, training, conversations, np.random.default_rng(1))
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in loaded.model.named_parameters()}
    rows = sft_trainer.rows_of(training, loaded, conversations, np.random.default_rng(1))
    weights = sft_trainer.loss_weights(training, conversations, rows)
    learner, found = learner_of(loaded)
    for name, packing in PACKINGS.items():
        loaded.model.zero_grad()
        monkeypatch.setattr(sft_trainer, "micro_batches", lambda rows, budget, packing=packing: packing(rows))
        figures = sft_trainer.sft_update(learner, rows, 0, *weights)
        assert figures["loss"] == pytest.approx(float(wanted.detach()), abs=1e-5), name
        assert figures["predicted_tokens"] == sum(len(row.target) for row in rows) > 0
        largest = max(gradient.abs().max() for gradient in gradients.values())
        for key, gradient in gradients.items():
            assert (found[key] - gradient).abs().max() <= 1e-5 * largest, (name, key)


def test_turns_of_a_conversation_share_their_clean_tokens(golden: dict[str, LoadedModel]) -> None:
    """A later turn's views beside an earlier one's give the losses that each has by itself, from fewer tokens."""
    loaded = golden["sdar"]
    first, second = [1, 2, 3, 4, 5, 6], [7, 8, 9]
    rest = [11, 12, 13, 14, 15]
    turns = [
        Example(first, [*second, 10, 10, 10], 4),
        Example([*first, *second, 10, *rest], [16, 17, 18, 10, 10], 4),
    ]
    training = SFTTrainingConfig(method="semi-ar", block_size=BLOCK)
    shared = sft_trainer.rows_of(training, loaded, [turns], np.random.default_rng(3))
    apart = sft_trainer.rows_of(training, loaded, [[turn] for turn in turns], np.random.default_rng(3))
    assert len(shared) == 1 and len(apart) == 2 and len(shared[0]) < len(apart[0]) + len(apart[1])
    logp = [logp_of(loaded, rows) for rows in (shared, apart)]
    assert torch.equal(*(torch.tensor(np.concatenate([row.target for row in rows])) for rows in (shared, apart)))
    assert (logp[0] - logp[1]).abs().max() < 1e-5
    assert set(shared[0].target.tolist()) <= {*second, 10, 16, 17, 18}, "nothing but the assistant's tokens"


def logp_of(loaded: LoadedModel, rows: Sequence[Row]) -> torch.Tensor:
    with torch.no_grad():
        policy = Policy(loaded.model, loaded.mask_id)
        return torch.cat([policy(pack([row], 10**6)[0])[0] for row in rows])


# ---- views


@pytest.mark.parametrize(("lower", "upper"), [(0.1, 0.9), (0.02, 1.0), (0.3, 0.3)])
@pytest.mark.parametrize(
    ("attention", "method"), [("block", "semi-ar"), ("full", "semi-ar"), ("full", "random_masking")]
)
def test_elbo_weights_average_to_one(attention: str, method: str, lower: float, upper: float) -> None:
    """E[weight × masked] is 1 for every token, short blocks included, though empty draws are repeated."""
    training = SFTTrainingConfig(
        method=method, block_size=4, lower_p=lower, upper_p=upper, loss_weight="elbo", mask_times_per_sample=20_000
    )
    example = Example([1, 2, 3], list(range(10, 19)) if attention == "block" else list(range(10, 22)), 7)
    views = SFT_METHODS[attention][method](
        example, Layout(0, 4 if attention == "block" else None), training, np.random.default_rng(0)
    )
    index, weight = views.response_index[views.predict], views.weight[views.predict]
    mean = np.bincount(index, weight, minlength=7) / 20_000
    assert np.abs(mean - 1).max() < 0.05 and len(mean) == 7


def test_next_tokens_see_only_what_is_before(golden: dict[str, LoadedModel]) -> None:
    """The row of `ar` ends where predictions end, and its blocks of one token are causal attention."""
    example, training = Example([1, 2], [3, 4, 5, 6, 6, 6], 4), SFTTrainingConfig(method="ar", post_num=1)
    views = next_token_views(example, Layout(0, None), training, None)
    assert views.inputs.tolist() == [[3, 4, 5, 6, 6]] and views.causal and views.predict.all()
    row = sft_trainer.rows_of(training, golden["dream"], [[example]], np.random.default_rng(0))[0]
    assert row.predict_at.tolist() == [1, 2, 3, 4, 5] and row.block.tolist() == list(range(7))


def test_methods_go_with_families(golden: dict[str, LoadedModel]) -> None:
    for family, methods in METHODS.items():
        for method in methods:
            sft_trainer.check_method(method, golden[family].family)
    with pytest.raises(UserError, match=r"training\.method=ar: llada has full attention and logits that are not"):
        sft_trainer.check_method("ar", golden["llada"].family)
    with pytest.raises(
        UserError, match=r"training\.method=random_masking: sdar has block attention.* semi-ar or trace"
    ):
        sft_trainer.check_method("random_masking", golden["sdar"].family)


# ---- packing


def rows_of_lengths(lengths: Sequence[int]) -> list[Row]:
    def row(number: int, length: int) -> Row:
        one = np.arange(length)
        return Row(number, one, one, one, np.zeros_like(one), one[:1], one[:1], one[:1], one[:1])

    return [row(number, length) for number, length in enumerate(lengths)]


def held(batches: Sequence[PackedBatch]) -> list[int]:
    """Which rows the batches hold, each as often as it is there."""
    return sorted(int(row) for batch in batches for line in batch.trajectory for row in line.unique() if row >= 0)


def test_joined_rows_fill_the_budget() -> None:
    lengths = [30, 10, 60, 25, 90, 5, 40, 130, 10]
    batches = pack(rows_of_lengths(lengths), 100, together=True)
    assert held(batches) == list(range(len(lengths)))
    assert all((batch.trajectory >= 0).all() and len(batch.ids) == 1 for batch in batches), "no padding"
    sizes = [batch.ids.shape[1] for batch in batches]
    assert sum(sizes) == sum(lengths) and max(sizes) == 130 and sorted(sizes)[-2] <= 100
    assert len(batches) == 4, "270 tokens beside the long one fit into three lines"
    assert fill_lines([], 100) == []


def test_rows_side_by_side_are_cut_before_padding_grows() -> None:
    lengths = [10] * 8 + [80] * 2
    for most, micro_batches in ((1.0, 1), (0.2, 2)):
        batches = pack(rows_of_lengths(lengths), 10**6, most_padding=most)
        assert len(batches) == micro_batches and held(batches) == list(range(10))
    assert sum(batch.ids.numel() for batch in batches) == sum(lengths)
