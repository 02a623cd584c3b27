"""The packed forward against one row per view: log-probabilities, gradients, the mask, and the engine's own numbers."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training_reference as plain
from accelerate import Accelerator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scored import scored

from common.errors import UserError
from common.memory import kept_bytes, size_of
from common.schema import (
    CPU_TOKENS,
    CUDA_TOKENS,
    LoraSettings,
    OptimizerParams,
    RLTrainingConfig,
    Sampling,
    SchedulerConfig,
    SchedulerParams,
    SFTTrainingConfig,
)
from common.trajectory import Request, Trajectory
from models import load_model, load_network
from models.lora import add_lora
from sample.engine import Engine
from train.attention import visible
from train.learner import (
    Learner,
    batch_logp,
    for_this_rank,
    keep_clean_copy,
    make_learner,
    micro_batches,
    rate_factor,
    update,
)
from train.network import Policy, chunk_positions
from train.objectives import loss_weights, policy_loss, tokens_of
from train.packing import PackedBatch, Part, Row, cut, cut_rows, make_rows, pack
from train.rl_step import learn, sample_rows
from train.sft_trainer import loss_weights as sft_weights
from train.sft_trainer import packed, sft_update
from train.views import Example, Layout, join_views, random_block_views, trace_views

GOLDEN = Path(__file__).parent / "golden" / "sdar"
BLOCK = 4


@dataclass(frozen=True)
class Network:
    """A model with what the tests have to know about its ids."""

    model: torch.nn.Module
    mask_id: int
    vocabulary: int
    stop_ids: tuple[int, ...]


@pytest.fixture(scope="module", params=["golden", "tiny"])
def network(request: pytest.FixtureRequest, tiny_sdar: Path) -> Network:
    if request.param == "golden":
        model = load_network(GOLDEN, "sdar")
        return Network(model, model.config.mask_token_id, model.config.vocab_size, (model.config.eos_token_id,))
    loaded = load_model(tiny_sdar, "sdar")
    return Network(loaded.model, loaded.mask_id, loaded.model.config.vocab_size, loaded.stop_ids)


def random_trajectories(network: Network, count: int, seed: int) -> list[Trajectory]:
    """Prompts with and without a remainder, responses of one to five blocks."""
    rng = np.random.default_rng(seed)
    return [
        plain.random_trajectory(
            rng, int(rng.integers(1, 14)), int(rng.integers(1, 6)), BLOCK, network.vocabulary, network.mask_id
        )
        for _ in range(count)
    ]


def packed_rows(network: Network, trajectories: Sequence[Trajectory], shrink: int = 1) -> list[Row]:
    samples = [scored(trajectory, 1.0) for trajectory in trajectories]
    return sample_rows(samples, RLTrainingConfig(shrink=shrink, post_num=1), Layout(network.mask_id, BLOCK), [0])


def plain_logp(network: Network, trajectories: Sequence[Trajectory], shrink: int = 1) -> list[torch.Tensor]:
    return [
        plain.view_logp(
            network.model,
            trajectory,
            plain.trace_views(trajectory, BLOCK, network.mask_id, shrink, post_num=1),
            BLOCK,
            network.mask_id,
            trajectory.temperature,
        )
        for trajectory in trajectories
    ]


def recording_learner(network: Network) -> tuple[Learner, plain.RecordingSGD]:
    optimizer = plain.RecordingSGD(list(network.model.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Learner(Policy(network.model, network.mask_id), optimizer, scheduler, Accelerator(), 1e9), optimizer


def gradients(network: Network, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(network.model.parameters())))


def assert_same_gradients(
    found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], network: Network, share: float
) -> None:
    for (name, _), one, other in zip(network.model.named_parameters(), found, wanted, strict=True):
        assert other.abs().max() > 0, name
        assert (one - other).abs().max() <= share * other.abs().max(), name


# ---- log-probabilities


@pytest.mark.parametrize(("shrink", "temperature"), [(1, 1.0), (2, 0.7), (4, 1.0)])
def test_packed_logp_equals_one_row_per_view(network: Network, shrink: int, temperature: float) -> None:
    trajectories = [replace(one, temperature=temperature) for one in random_trajectories(network, 5, seed=shrink)]
    rows = packed_rows(network, trajectories, shrink)
    batches = pack(rows, token_budget=150)
    assert len(batches) > 1 and any(len(batch.ids) > 1 for batch in batches)
    learner, _ = recording_learner(network)
    found = batch_logp(learner, batches, temperature)
    with torch.no_grad():
        wanted = torch.cat(plain_logp(network, trajectories, shrink))
    # random ids have logp down to -25, where fp32 itself rounds by 1e-6 of that
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)


def test_golden_generations(network: Network) -> None:
    """The reference's own texts, prompts with and without a remainder, unmasked in the reference's kind of order."""
    tensors = load_file(GOLDEN / "expected.safetensors")
    rng, trajectories = np.random.default_rng(0), []
    for case in (0, 1, 2, 4):
        size = len(tensors[f"prompt_{case}"])
        blocks = (len(tensors[f"tokens_{case}"]) - size // BLOCK * BLOCK) // BLOCK
        one = plain.random_trajectory(rng, size, blocks, BLOCK, network.vocabulary, network.mask_id)
        ids = (tensors[f"tokens_{case}"] % (network.vocabulary - 2)).tolist()
        trajectories.append(replace(one, prompt_ids=ids[:size], response_ids=ids[size:]))
    assert {len(one.prompt_ids) % BLOCK for one in trajectories} == {0, 1, 3}
    rows = packed_rows(network, trajectories)
    learner, _ = recording_learner(network)
    found = batch_logp(learner, pack(rows, 10**6), 1.0)
    with torch.no_grad():
        wanted = torch.cat(plain_logp(network, trajectories))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)


def test_entropy_is_that_of_the_predicted_distribution(network: Network) -> None:
    (trajectory,) = random_trajectories(network, 1, seed=8)
    (batch,) = pack(packed_rows(network, [trajectory]), 10**6)
    with torch.no_grad():
        _, entropy = Policy(network.model, network.mask_id)(batch, 0.7)
        view = plain.trace_views(trajectory, BLOCK, network.mask_id, post_num=1)[0]
        seen = (trajectory.prompt_ids + trajectory.response_ids)[: view.start] + view.tokens
        logits = plain.block_causal_logits(network.model, seen, BLOCK)[view.start + view.offsets[0]] / 0.7
    logits[network.mask_id] = -torch.inf
    assert float(entropy[0]) == pytest.approx(float(torch.distributions.Categorical(logits=logits).entropy()), abs=1e-5)


def test_logits_in_chunks_are_the_same(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = pack(packed_rows(network, random_trajectories(network, 3, seed=4)), 10**6)
    policy, results = Policy(network.model, network.mask_id), []
    for positions in (10**6, 5):
        monkeypatch.setattr("train.network.CHUNK_ELEMENTS", positions * network.vocabulary)
        monkeypatch.setattr("train.network.LEAST_POSITIONS", 1)
        logp, _ = policy(batch)
        results.append((logp.detach(), gradients(network, logp.sum())))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=2e-6)
    assert_same_gradients(results[1][1], results[0][1], network, 1e-5)


def test_chunks_of_the_head_are_larger_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunk_positions(151_936, torch.device("cpu")) == 256 and chunk_positions(4096, torch.device("cpu")) == 2048
    found = []
    for gib in (141, 79, 40, 16):
        properties = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        found.append(chunk_positions(151_936, torch.device("cuda")))
    assert found == [2048, 2048, 1024, 1024]


# ---- to the device


@pytest.mark.parametrize("record", ["batch", "tokens"])
def test_a_record_goes_to_the_device_in_one_copy(record: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(torch.nn.Identity(), 7, 40, ())
    trajectories = [
        replace(one, logp=[-0.5] * len(one.response_ids)) for one in random_trajectories(network, 3, seed=2)
    ]
    rows = packed_rows(network, trajectories)
    (batch,) = pack(rows, 10**6)
    tokens = tokens_of(rows, [scored(one, 0.5) for one in trajectories])[np.arange(7)]  # an odd number, and two dtypes
    assert {tokens.advantage.dtype, tokens.trajectory.dtype} == {torch.float32, torch.int64}
    copies: list[tuple] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *to, **named: copies.append((to, named)) or self.clone())
    given = batch if record == "batch" else tokens
    there = given.to(torch.device("meta"))  # any but the host's: what is copied stays readable
    assert copies == [((torch.device("meta"),), {"non_blocking": True})]
    for name, one in vars(given).items():
        other = getattr(there, name)
        if not isinstance(one, torch.Tensor):
            assert other is one
            continue
        assert other.dtype == one.dtype and torch.equal(other, one), name
        assert other.data_ptr() % 16 == 0 and other.is_contiguous()


def test_joined_rows_are_whole_tiles_and_the_padding_says_nothing(network: Network) -> None:
    rows = packed_rows(network, random_trajectories(network, 6, seed=5))
    plain, padded = pack(rows, 150, together=True), pack(rows, 150, together=True, multiple=32)
    assert max(map(len, rows)) < 128 and len(padded) > 1 and any(batch.ids.shape[1] % 32 for batch in plain)
    assert all(batch.ids.shape[1] % 32 == 0 and batch.ids.shape[1] <= 128 for batch in padded)
    learner, _ = recording_learner(network)
    wanted, found = batch_logp(learner, plain, 1.0), batch_logp(learner, padded, 1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)


# ---- gradients


@pytest.mark.parametrize("loss_norm", ["token", "length", "step"])
def test_gradients_equal_one_row_per_view(network: Network, loss_norm: str) -> None:
    trajectories = random_trajectories(network, 3, seed=11)
    rows = packed_rows(network, trajectories)
    count = sum(len(row.target) for row in rows)
    rng = np.random.default_rng(0)
    reference = plain_logp(network, trajectories)
    # some ratios within the clip, some beyond, and a reference of its own
    old = torch.cat(reference).detach() + torch.tensor(rng.normal(0, 0.3, count), dtype=torch.float32)
    anchor = torch.cat(reference).detach() + torch.tensor(rng.normal(0, 0.3, count), dtype=torch.float32)
    advantage = [1.5, -0.5, -1.0]
    responses, start = [], 0
    for number, (row, logp) in enumerate(zip(rows, reference)):
        responses.append(
            [
                plain.PlainToken(logp[i], float(old[start + i]), float(anchor[start + i]), advantage[number], step)
                for i, step in enumerate(row.trace_step.tolist())
            ]
        )
        start += len(row.target)
    wanted = plain.update_loss(responses, loss_norm, max_gen_length=20, beta=0.1)

    tokens = tokens_of(rows, [scored(one, value) for one, value in zip(trajectories, advantage)])
    tokens.old_logp, tokens.reference_logp = old, anchor
    tokens.weight = torch.tensor(loss_weights(tokens, loss_norm, 20), dtype=torch.float32)
    policy, found = Policy(network.model, network.mask_id), 0
    for batch in pack(rows, 200):
        logp, _ = policy(batch)
        found = found + policy_loss(logp, tokens[batch.predicted], 0.2, 0.1)[0]
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert_same_gradients(gradients(network, found), gradients(network, wanted), network, 1e-5)


def engine_like(network: Network, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories with the policy's own logp, as an engine would have recorded it."""
    result = []
    with torch.no_grad():
        for one in trajectories:
            views = plain.trace_views(one, BLOCK, network.mask_id, post_num=len(one.response_ids))
            values = plain.view_logp(network.model, one, views, BLOCK, network.mask_id, one.temperature).tolist()
            logp = dict(zip([i for view in views for i in view.response_indices], values))
            result.append(replace(one, logp=[logp[i] for i in range(len(logp))]))
    return result


def test_the_update_does_not_depend_on_the_micro_batch(network: Network) -> None:
    """Seven responses in two updates: an uneven tail, and micro-batches of one row, of some, of all; rows are whole."""
    trajectories = engine_like(network, random_trajectories(network, 7, seed=21))
    samples = [scored(one, float(value)) for one, value in zip(trajectories, np.linspace(-1.5, 1.2, 7))]
    results = []
    longest = max(map(len, packed_rows(network, trajectories)))
    for budget in (longest, 260, 10**6):
        learner, optimizer = recording_learner(network)
        training = RLTrainingConfig(updates_per_step=2, tokens_per_micro_batch=budget, loss_norm="step")
        figures = learn(learner, samples, training, Layout(network.mask_id, BLOCK), 20, seed=[1, 2], exact=True)
        assert figures["updates"] == len(optimizer.recorded) == 2
        assert figures["predicted_tokens"] == sum(one.length for one in trajectories)
        results.append((figures, optimizer.recorded))
    for figures, recorded in results[1:]:
        assert figures["loss"] == pytest.approx(results[0][0]["loss"], abs=1e-6)
        for found, wanted in zip(recorded, results[0][1], strict=True):
            assert_same_gradients(found, wanted, network, 2e-6)


def test_finetuning_is_the_same_in_cut_rows(network: Network) -> None:
    """Two conversations that differ in their last turn, and a single one; all but the head in float64."""
    rng, model = np.random.default_rng(3), deepcopy(network.model).double()
    training = SFTTrainingConfig(mask_times_per_sample=3, loss_weight="elbo", block_size=BLOCK)
    ids, other = (rng.integers(0, network.mask_id, 40).tolist() for _ in range(2))
    first = Example(ids[:5], ids[5:16], 11)
    conversations = [
        [first, Example(ids[:22], ids[22:40], 15)],
        [first, Example(ids[:22], other[:14], 12)],
        [Example(ids[:9], ids[9:32], 21)],
    ]
    layout = Layout(network.mask_id, BLOCK)
    views = [
        join_views([random_block_views(one, layout, training, rng) for one in examples]) for examples in conversations
    ]
    rows = packed(conversations, views, layout)
    learner, optimizer = recording_learner(replace(network, model=model))
    losses = [
        sft_update(learner, rows, budget, *sft_weights(training, conversations, rows))["loss"]
        for budget in (10**6, 60, 30)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    whole, *cut = (torch.cat([one.flatten() for one in recorded]) for recorded in optimizer.recorded)
    assert all((one - whole).norm() <= 1e-6 * whole.norm() for one in cut)


def test_what_pieces_keep_takes_what_is_said(network: Network) -> None:
    learner, _ = recording_learner(network)
    turns = for_this_rank(pack(packed_rows(network, random_trajectories(network, 3, seed=5)), 20))
    kept = [keep_clean_copy(learner, turn) for turn in turns]
    assert any(kept)
    for turn, one in zip(turns, kept):
        assert (one is None) == (len(turn.batches) == 1)
        if one is not None:
            told = kept_bytes(size_of(network.model.config.to_dict()), turn.batches[-1].piece.before, word=4)
            assert one.values.nbytes + one.slopes.nbytes == told > 0


@pytest.mark.parametrize("way", ["adapters", "bfloat16"])
def test_pieces_with_adapters_and_in_half_precision(way: str, tiny_sdar: Path) -> None:
    """Layers are computed again in the backward pass; pieces are of less than the clean copy."""
    model = load_model(tiny_sdar, "sdar").model
    if way == "adapters":
        model = model.double()
        add_lora(model, LoraSettings(r=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.gradient_checkpointing_enable()
    trained = [one for one in model.parameters() if one.requires_grad]
    network = Network(model, 38, 39, ())
    samples = [scored(one, -1.0) for one in random_trajectories(network, 2, seed=0)]
    found = []
    for budget in (10**6, 40, 12):
        learner, _ = recording_learner(network)
        learner.optimizer = plain.RecordingSGD(trained)
        training = RLTrainingConfig(tokens_per_micro_batch=budget, old_logp="detach")
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
            learn(learner, samples, training, Layout(38, BLOCK), 20, seed=[0], exact=False)
        found.append(torch.cat([one.flatten() for one in learner.optimizer.recorded[0]]))
    rows = packed_rows(network, [one.trajectory for one in samples])
    assert max(int((row.view == 0).sum()) for row in rows) > 12
    for one in found[1:]:
        assert (one - found[0]).norm() <= (0.05 if way == "bfloat16" else 1e-6) * found[0].norm() and one.any()


def test_one_update_is_the_reference_s(network: Network) -> None:
    """`learn` as a whole: weights, advantages and old log-probabilities reach the right tokens."""
    trajectories = engine_like(network, random_trajectories(network, 3, seed=31))
    advantage = [1.0, -0.25, -0.75]
    learner, optimizer = recording_learner(network)
    samples = [scored(one, value) for one, value in zip(trajectories, advantage)]
    training = RLTrainingConfig(tokens_per_micro_batch=100, loss_norm="length")
    learn(learner, samples, training, Layout(network.mask_id, BLOCK), 20, seed=[0], exact=True)
    responses = []
    for one, value in zip(trajectories, advantage):
        views = plain.trace_views(one, BLOCK, network.mask_id)
        logp = plain.view_logp(network.model, one, views, BLOCK, network.mask_id)
        indices = [i for view in views for i in view.response_indices]
        steps = [step for view in views for step in view.steps]
        old = [one.logp[i] for i in indices]
        responses.append([plain.PlainToken(*values) for values in zip(logp, old, old, [value] * len(old), steps)])
    wanted = plain.update_loss(responses, "length", 20)
    assert_same_gradients(optimizer.recorded[0], gradients(network, wanted), network, 1e-5)


def test_gradient_checkpointing_recomputes_layers_and_changes_nothing() -> None:
    model = load_network(GOLDEN, "sdar")
    network = Network(model, model.config.mask_token_id, model.config.vocab_size, ())
    samples = [scored(one, 1.0) for one in engine_like(network, random_trajectories(network, 2, seed=1))]
    calls, results = [], []
    # a pre-hook: the second pass stops as soon as it has what the backward pass needs
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        calls.clear()
        learner, optimizer = recording_learner(network)
        learn(learner, samples, RLTrainingConfig(), Layout(network.mask_id, BLOCK), 20, seed=[0], exact=True)
        results.append((len(calls), optimizer.recorded[0]))
        assert not model.training  # the engine may share the network
    assert results[1][0] == 2 * results[0][0]
    assert_same_gradients(results[1][1], results[0][1], network, 1e-6)


def test_a_processor_has_a_smaller_budget_of_its_own(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = packed_rows(network, random_trajectories(network, 3, seed=3)) * 20
    for cuda, tokens in ((False, CPU_TOKENS), (True, CUDA_TOKENS)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        own, asked = (micro_batches(rows, budget) for budget in (None, tokens))
        assert [batch.predicted.tolist() for batch in own] == [batch.predicted.tolist() for batch in asked]
    assert CPU_TOKENS < CUDA_TOKENS


# ---- rows and mask


def described(row: Row) -> list[tuple[str, int, int]]:
    """Every token of a row as (kind, block, number of its view), from the layout the design gives."""
    clean = int((row.view == 0).sum())
    tokens = [("clean", position // BLOCK, 0) for position in range(clean)]
    for number in range((len(row) - clean) // BLOCK):
        start = clean + number * BLOCK
        tokens += [("view", int(row.position[start]) // BLOCK, number + 1)] * BLOCK
    return tokens


def sees(query: tuple[str, int, int], key: tuple[str, int, int]) -> bool:
    if query[0] == "clean":
        return key[0] == "clean" and key[1] <= query[1]
    return (key[0] == "clean" and key[1] < query[1]) or (key[0] == "view" and key[2] == query[2])


def group(network: Network, count: int, seed: int) -> list[Trajectory]:
    """Random trajectories, of which the first two thirds are responses to one prompt."""
    rng, trajectories = np.random.default_rng(seed), random_trajectories(network, count, seed)
    prompt = trajectories[0].prompt_ids
    others = [
        plain.random_trajectory(rng, len(prompt), int(rng.integers(1, 6)), BLOCK, network.vocabulary, network.mask_id)
        for _ in range(count * 2 // 3 - 1)
    ]
    return [trajectories[0], *(replace(one, prompt_ids=prompt) for one in others), *trajectories[count * 2 // 3 :]]


def placed(batch: PackedBatch, line: int, parts: Sequence[Part]) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
    """Every part of a line with the places of its own tokens, and of all that it has, where it shares some of them."""
    trajectory, prompt = batch.trajectory[line].numpy(), batch.prompt[line].numpy()
    for number in set(trajectory.tolist()) & set(range(len(parts))):
        own = np.flatnonzero(trajectory == number)
        (shared,) = set(prompt[own].tolist())
        yield parts[number], own, own if shared == number else np.append(np.flatnonzero(trajectory == shared), own)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 400), st.sampled_from([1, 2]), st.sampled_from([0, 1, 32]))
def test_the_mask_equals_the_rule(seed: int, budget: int, shrink: int, multiple: int) -> None:
    """Each token sees what it would see in its row alone: whether its prompt is shared, or it is in a piece."""
    network = Network(torch.nn.Identity(), 7, 40, ())
    rows = packed_rows(network, group(network, 4, seed), shrink)
    budget = max(budget, multiple)
    parts = cut_rows(rows, budget // max(1, multiple) * max(1, multiple))
    for batch in pack(rows, budget, together=multiple > 0, multiple=max(1, multiple)):
        mask, width = visible(batch)[:, 0].numpy(), 0 if batch.piece is None else batch.piece.width
        assert mask.dtype == bool and mask.shape == (*batch.ids.shape, width + batch.ids.shape[1])
        assert mask.any(-1).all()  # a query that sees nothing would be NaN
        for line in range(len(batch.ids)):
            for part, _, places in placed(batch, line, parts):
                row = described(rows[part.row])
                assert len(places) == len(part.tokens)
                # of every key the token of the row that it is, if it is one of them
                keys = np.full(mask.shape[2], -1)
                keys[width + places] = part.tokens
                if batch.piece is not None:
                    keys[: batch.piece.before] = np.arange(batch.piece.before)
                for place, token in zip(places, part.tokens):
                    found, wanted = keys[mask[line, place]], [sees(row[token], key) for key in row]
                    assert sorted(found.tolist()) == np.flatnonzero(wanted).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 600), st.booleans())
@example(185, 3, 20, False)  # some share a prompt beside pieces
def test_no_row_is_lost(seed: int, count: int, budget: int, together: bool) -> None:
    network = Network(torch.nn.Identity(), 7, 40, ())
    rows = packed_rows(network, group(network, count, seed))
    batches, parts = pack(rows, budget, together=together), cut_rows(rows, budget)
    total = sum(len(row.target) for row in rows)
    assert sorted(i for batch in batches for i in batch.predicted.tolist()) == list(range(total))
    targets = np.concatenate([row.target for row in rows])
    found: list[int] = []
    for batch in batches:
        assert batch.ids.numel() <= budget or len(batch.ids) == 1
        for line in range(len(batch.ids)):
            for part, _, places in placed(batch, line, parts):
                found.append(part.trajectory)
                for name in ("ids", "position", "block", "view"):
                    column = getattr(batch, name)[line].numpy()[places]
                    np.testing.assert_array_equal(column, getattr(rows[part.row], name)[part.tokens])
        np.testing.assert_array_equal(batch.target.numpy(), targets[batch.predicted])
        assert (batch.ids.flatten()[batch.predict_at] == 7).all()  # what is predicted is masked
    assert sorted(found) == list(range(len(parts)))
    assert sum(int(batch.counted.sum()) for batch in batches) == sum(map(len, rows))


def test_a_group_has_its_prompt_once() -> None:
    """Five responses to a prompt of 13, three blocks of which are shared; a budget for two or three; a prompt of 3."""
    network = Network(torch.nn.Identity(), 7, 40, ())
    rng = np.random.default_rng(0)
    one, *others = (plain.random_trajectory(rng, 13, 2, BLOCK, 40, 7) for _ in range(5))
    rows = packed_rows(network, [one, *(replace(other, prompt_ids=one.prompt_ids) for other in others)])
    own = [len(row) - 12 for row in rows]
    (batch,) = pack(rows, 10**6, together=True)
    assert batch.ids.shape == (1, 12 + sum(own)) and batch.counted[0, :13].tolist() == [5] * 12 + [1]
    budget = 12 + 2 * max(own)
    batches = pack(rows, budget, together=True)
    assert 1 < len(batches) < 5 and all(batch.ids.numel() <= budget for batch in batches)
    assert sum(batch.ids.numel() for batch in batches) == len(batches) * 12 + sum(own)
    assert all(ranks <= len(pack(rows, 10**6, at_least=ranks, together=True)) <= 5 for ranks in (1, 2, 3, 5))
    experts = [replace(row, routes=np.full((len(row), 1, 1), number % 2)) for number, row in enumerate(rows)]
    (batch,) = pack(experts, 10**6, together=True)
    assert batch.ids.numel() == 2 * 12 + sum(own), "other experts of the sampler's: another prompt"
    short = packed_rows(network, [plain.random_trajectory(np.random.default_rng(1), 3, 2, BLOCK, 40, 7)] * 2)
    (batch,) = pack(short, 10**6, together=True)
    assert batch.ids.numel() == sum(map(len, short)), "less than a block of the prompt: a response's own"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 100), st.sampled_from(["TraceRL", "random_masking"]))
def test_pieces_are_few_and_of_one_size(seed: int, budget: int, method: str) -> None:
    """Every token is in one piece; its clean tokens are the first of its own, and follow those of the pieces before."""
    network = Network(torch.nn.Identity(), 7, 40, ())
    (one,) = random_trajectories(network, 1, seed)
    training = RLTrainingConfig(method=method, mask_times_per_sample=4, post_num=1)
    for row in sample_rows([scored(one)], training, Layout(7, BLOCK), [seed]):
        pieces, atoms = cut(row, budget), len(row) // BLOCK
        assert sorted(np.concatenate(pieces).tolist()) == list(range(len(row)))
        at_once = max(1, budget // BLOCK)
        assert len(pieces) == (1 if len(row) <= budget else -(-atoms // at_once))
        sizes = [len(tokens) for tokens in pieces]
        assert max(sizes) <= max(budget, BLOCK) and max(sizes) - min(sizes) <= BLOCK
        clean = [tokens[row.view[tokens] == 0] for tokens in pieces]
        assert np.concatenate(clean).tolist() == list(range(int((row.view == 0).sum())))
        batches = [batch for batch in pack([row], budget) if batch.piece]
        if batches:
            assert [batch.piece.number for batch in batches] == list(range(len(pieces)))
            copy = torch.cat([one.ids[0] for one in batches[-1].clean_copy]) if batches[-1].clean_copy else []
            assert len(copy) == batches[-1].piece.before and (row.ids[: len(copy)] == np.array(copy)).all()
            assert all(one.ids.numel() <= max(budget, BLOCK) for one in batches[-1].clean_copy)
            assert not any(batch.clean_copy for batch in batches[:-1])


def test_a_row_is_clean_tokens_then_views() -> None:
    """Prompt of five, one block of remainder and one of response: ids and positions written out."""
    one = plain.random_trajectory(np.random.default_rng(0), 5, 2, BLOCK, 40, 7)
    trajectory = replace(one, step_map=[1, 0, 1, 2, 2, 3, 2], length=7)
    p, r = trajectory.prompt_ids, trajectory.response_ids
    (row,) = make_rows(3, p, r, trace_views(trajectory, Layout(7, BLOCK)))
    views = [[p[4], 7, 7, 7], [p[4], 7, r[1], 7], [7, 7, 7, 7], [r[3], r[4], 7, r[6]]]
    assert row.ids.tolist() == [*p, *r[:3], *(token for view in views for token in view)]
    assert row.position.tolist() == [*range(8), 4, 5, 6, 7, 4, 5, 6, 7, 8, 9, 10, 11, 8, 9, 10, 11]
    assert row.target.tolist() == [r[1], r[0], r[2], r[3], r[4], r[6], r[5]]
    assert row.predict_at.tolist() == [10, 13, 15, 16, 17, 19, 22]
    assert row.response_index.tolist() == [1, 0, 2, 3, 4, 6, 5] and row.trajectory == 3


# ---- the engine's numbers


@pytest.mark.parametrize(
    "settings_of_draw",
    [
        {"temperature": 1.0, "remasking_strategy": "low_confidence_static"},
        {"temperature": 1.0, "remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.03},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "remasking_strategy": "low_confidence_static"},
        {"temperature": 0.0, "remasking_strategy": "sequential", "denoising_steps_per_block": 2},
        {"temperature": 0.7, "top_k": 1, "remasking_strategy": "low_confidence_dynamic", "dynamic_threshold": 0.1},
    ],
    ids=["temperature-1", "dynamic", "filtered", "greedy", "top-1"],
)
def test_trainer_equals_engine(network: Network, settings_of_draw: dict) -> None:
    """Fresh responses of several lengths, more than fit side by side: the replay gives the recorded numbers."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, network.vocabulary - 8, size).tolist() for size in (3, 4, 9, 14, 16, 6)]
    drawn = Sampling(block_size=BLOCK, max_token=15, max_active=4, **settings_of_draw)
    requests = [Request(str(n), prompt, seed=5) for n, prompt in enumerate(prompts)]
    trajectories = list(Engine(network.model, network.mask_id, network.stop_ids).generate(requests, drawn))
    assert len(trajectories) == 6
    # predict what lies behind the limit too: it was drawn and recorded like the rest
    samples = [scored(one, 1.0) for one in trajectories]
    rows = sample_rows(samples, RLTrainingConfig(post_num=BLOCK), Layout(network.mask_id, BLOCK), [0])
    recorded = torch.cat([torch.tensor(one.logp)[row.response_index] for one, row in zip(trajectories, rows)])
    assert len(recorded) == sum(len(one.response_ids) for one in trajectories)
    temperature = 1.0 if drawn.temperature == 0 or drawn.top_k == 1 else drawn.temperature
    assert {one.temperature for one in trajectories} == {temperature}
    learner, _ = recording_learner(network)
    found = batch_logp(learner, pack(rows, 300), temperature)
    torch.testing.assert_close(found, recorded, rtol=0, atol=1e-5)
    with torch.no_grad():
        views = plain.trace_views(trajectories[0], BLOCK, network.mask_id)
        slow = plain.view_logp(network.model, trajectories[0], views, BLOCK, network.mask_id, temperature)
    of_first = torch.tensor(trajectories[0].logp)[[i for view in views for i in view.response_indices]]
    torch.testing.assert_close(slow, of_first, rtol=0, atol=1e-5)


# ---- the optimizer's side


def one_batch(network: Network) -> list[PackedBatch]:
    return pack(packed_rows(network, random_trajectories(network, 2, seed=0)), 10**6)


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_skipped(network: Network, spoilt: str) -> None:
    """Weights, optimizer and schedule stay; so many in a row end the run, one good update in between forgives."""
    learner, optimizer = recording_learner(network)
    learner.max_bad_steps = 2

    def loss(batch: PackedBatch, bad: bool = True) -> torch.Tensor:
        value = learner.network(batch)[0].sum()
        if not bad:
            return value
        # sqrt at 0 has a finite value and an infinite slope
        return value * float("nan") if spoilt == "loss" else value + (value - value.detach()).sqrt()

    def bad() -> None:
        assert not update(learner, one_batch(network), loss).taken

    bad()
    assert not optimizer.recorded and not network.model.training and learner.scheduler.last_epoch == 0
    assert all(p.grad is None for p in network.model.parameters())
    done = update(learner, one_batch(network), lambda batch: loss(batch, bad=False))
    assert done.taken and len(optimizer.recorded) == 1 and learner.bad_in_a_row == 0
    bad()
    with pytest.raises(UserError, match=r"^training.max_bad_steps=2: that many updates in a row.*learning rate"):
        bad()
    assert len(optimizer.recorded) == 1


def test_gradients_are_clipped_to_the_norm(network: Network) -> None:
    learner, optimizer = recording_learner(network)

    def loss(batch: PackedBatch) -> torch.Tensor:
        return -learner.network(batch)[0].mean()

    def norm_of(gradients: list[torch.Tensor]) -> float:
        return float(torch.cat([one.flatten() for one in gradients]).norm())

    whole = update(learner, one_batch(network), loss).grad_norm
    assert norm_of(optimizer.recorded[0]) == pytest.approx(whole, rel=1e-4)
    learner.max_grad_norm = whole / 10
    assert update(learner, one_batch(network), loss).grad_norm == pytest.approx(whole, rel=1e-5)
    assert norm_of(optimizer.recorded[1]) == pytest.approx(whole / 10, rel=1e-4)
    learner.max_grad_norm = 0
    update(learner, one_batch(network), loss)
    assert norm_of(optimizer.recorded[2]) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.0, 0.5, 1.0, 0.8828427, 0.6, 0.3171573, 0.2]),
    ],
)
def test_schedules(network: Network, scheduler: str, rates: list[float]) -> None:
    """Two updates of warm-up, then down to min_lr_scale; with the default scale of 1 every schedule is constant."""
    schedule = SchedulerConfig(scheduler, SchedulerParams(warmup_steps=2, min_lr_scale=0.2))
    assert [rate_factor(schedule, done, 6) for done in range(7)] == pytest.approx(rates, abs=1e-6)
    assert rate_factor(SchedulerConfig(scheduler), 5, 6) == 1.0
    optimizer = OptimizerParams()
    learner = make_learner(Policy(network.model, network.mask_id), optimizer, schedule, 6, RLTrainingConfig())
    for _ in range(4):
        learner.optimizer.step()
        learner.scheduler.step()
    peak = optimizer.learning_rate
    assert learner.scheduler.get_last_lr()[0] == pytest.approx(rates[4] * peak, rel=1e-5)
