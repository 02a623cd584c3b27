"""The mask by tiles against the dense one: the same pairs on any device, the same outputs and gradients on a GPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from common.schema import RLTrainingConfig
from models import load_network
from train import network as network_module
from train.attention import (
    NAME,
    TiledMask,
    attention_mask,
    block_mask,
    flex_or_sdpa,
    mask_function,
    visible,
    visible_tiles,
)
from train.network import Policy
from train.packing import PackedBatch, Row, make_rows, pack
from train.views import RL_METHODS, Layout

GOLDEN = Path(__file__).parent / "golden" / "sdar"
BLOCK, VOCABULARY, MASK = 4, 40, 7


def random_rows(seed: int, count: int, full: bool = False, shared: bool = False) -> list[Row]:
    """Rows of random trajectories, of their traces under block attention or of random views under full attention.

    `shared`: every one after the first is a response to the first one's prompt.
    """
    rng, rows, first = np.random.default_rng(seed), [], None
    training = RLTrainingConfig(mask_times_per_sample=2)
    for number in range(count):
        prompt, blocks = int(rng.integers(1, 14)), int(rng.integers(1, 8))
        prompt = len(first.prompt_ids) if shared and first else prompt
        one = plain.random_trajectory(rng, prompt, blocks, BLOCK, VOCABULARY, MASK)
        first = first or one
        one = replace(one, prompt_ids=first.prompt_ids) if shared else one
        method = RL_METHODS["random_masking" if full else "TraceRL"]
        views = method(one, Layout(MASK, None if full else BLOCK), training, rng)
        rows += make_rows(number, one.prompt_ids, one.response_ids, views)
    return rows


def joined(batch: PackedBatch) -> PackedBatch:
    """The batch's rows one after another in a single one, padding and all, as they lie on CUDA."""
    columns = {
        name: one.reshape(1, -1) for name, one in vars(batch).items() if getattr(one, "shape", ()) == batch.ids.shape
    }
    return replace(batch, **columns)


def some_batch(seed: int, kind: str, shared: bool) -> PackedBatch:
    """Rows side by side, the same joined, those of full attention, or a piece of a row, behind what others keep."""
    rows = random_rows(seed, 3, kind == "full", shared)
    if kind.startswith("piece"):
        return pack(rows, 24, together=True, multiple=8 if kind == "piece, padded" else 1)[-1]
    (batch,) = pack(rows, 10**6)
    return joined(batch) if kind == "joined" else batch


KINDS = st.sampled_from(["block", "joined", "full", "piece", "piece, padded"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([8, 16, 32]), KINDS, st.booleans())
def test_every_pair_is_the_dense_mask_s(seed: int, tile: int, kind: str, shared: bool) -> None:
    """What FlexAttention asks of the function, and which tiles it asks it for, give the dense mask again."""
    batch = some_batch(seed, kind, shared)
    dense = visible(batch)
    rows, _, length, keys = dense.shape
    assert length == batch.ids.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(keys)
    rule = mask_function(batch)
    pairs = torch.stack([rule(torch.tensor(row), None, query, key) for row in range(rows)])[:, None]
    assert torch.equal(pairs, dense)
    mask = block_mask(batch, tile)
    assert mask.shape == (rows, 1, length, keys)
    for row in range(rows):
        for query in range(-(-length // tile)):
            full_keys = mask.full_kv_indices[row, 0, query, : mask.full_kv_num_blocks[row, 0, query]].tolist()
            some_keys = mask.kv_indices[row, 0, query, : mask.kv_num_blocks[row, 0, query]].tolist()
            for key in range(-(-keys // tile)):
                seen = dense[row, 0, query * tile : (query + 1) * tile, key * tile : (key + 1) * tile]
                whole = seen.shape == (tile, tile) and bool(seen.all())
                assert (key in full_keys) == whole
                assert (key in some_keys) == (bool(seen.any()) and not whole)


def test_rows_longer_than_one_look_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = pack(random_rows(5, 3), 10**6)
    at_once = visible_tiles(batch, 8)
    monkeypatch.setattr("train.attention.QUERIES", 16)
    for found, wanted in zip(visible_tiles(batch, 8), at_once):
        assert torch.equal(found, wanted)


def test_flex_attention_follows_the_mask() -> None:
    """Torch's own kernel, forward, on whatever device: its backward exists on CUDA only."""
    (batch,) = pack(random_rows(3, 3), 10**6)
    batch, generator = joined(batch), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, batch.ids.shape[1], 16, generator=generator) for _ in range(3))
    found = flex_attention(query, key, value, block_mask=block_mask(batch, 16))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible(batch))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([8, 16, 32]), KINDS, st.booleans())
def test_tiles_are_the_dense_mask_s(seed: int, tile: int, kind: str, shared: bool) -> None:
    """Every pair is in one tile, and a key that no query of a tile sees is not among its own."""
    batch = some_batch(seed, kind, shared)
    mask, dense = TiledMask(batch, tile), visible(batch)
    found = torch.zeros_like(dense)
    for one in mask.tiles:
        seen = one.mask(torch.zeros(1)) == 0
        assert seen.any(2).any(0).all() and not one.bias.isfinite().all(2).all(0).any()
        parts = seen.split([key.stop - key.start for key in one.keys], dim=3)
        for key, part in zip(one.keys, parts):
            found[:, :, one.queries, key] = part
    assert torch.equal(found, dense) and mask.shape == dense.shape


@pytest.mark.parametrize("full", [False, True], ids=["block", "full"])
def test_tiles_give_the_gradients_of_the_dense_mask(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows side by side, of several lengths; also where layers are computed again in the backward pass."""
    model = load_network(GOLDEN, "sdar")
    (batch,), results = pack(random_rows(6, 4, full), 10**6), []
    policy = Policy(model, MASK)
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
            model.train()
        for mask in (visible, lambda batch: TiledMask(batch, 16)):
            monkeypatch.setattr(network_module, "attention_mask", mask)
            logp, _ = policy(batch)
            results.append((logp.detach(), torch.autograd.grad(logp.sum(), list(model.parameters()))))
    dense, wanted = results[0]
    for tiled, found in results[1:]:
        torch.testing.assert_close(tiled, dense, rtol=0, atol=2e-6)
        for one, other in zip(found, wanted):
            assert (one - other).abs().max() <= 2e-6 * other.abs().max()


def test_tiles_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys come in float32, values in bfloat16."""
    model, (batch,), found = load_network(GOLDEN, "sdar"), pack(random_rows(6, 4), 10**6), []
    for mask in (visible, lambda batch: TiledMask(batch, 16)):
        monkeypatch.setattr(network_module, "attention_mask", mask)
        with torch.autocast("cpu", torch.bfloat16):
            logp, _ = Policy(model, MASK)(batch)
        (slope,) = torch.autograd.grad(logp.sum(), [model.model.layers[0].self_attn.k_proj.weight])
        found.append((logp.detach(), slope))
    for one, other in zip(*found):
        assert one.isfinite().all() and (one - other).norm() <= 0.05 * other.norm()


def test_long_rows_are_taken_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = pack(random_rows(4, 2), 10**6)
    assert not isinstance(attention_mask(batch), TiledMask)
    monkeypatch.setattr("train.attention.TILE", batch.ids.shape[1] // 2 - 1)
    assert isinstance(attention_mask(batch), TiledMask)


def test_a_network_takes_dense_masks_as_before() -> None:
    model = load_network(GOLDEN, "sdar")
    (batch,) = pack(random_rows(4, 2), 10**6)
    inputs = {"input_ids": batch.ids, "position_ids": batch.position, "attention_mask": visible(batch)}
    with torch.no_grad():
        before = model.model(**inputs).last_hidden_state
        policy = Policy(model, MASK)
        assert model.config._attn_implementation == NAME and attention_mask(batch).dtype == torch.bool
        assert torch.equal(model.model(**inputs).last_hidden_state, before)
        assert policy(batch)[0].isfinite().all()
    assert "attn_implementation" not in str(model.config.to_dict())


def test_the_mask_s_kind_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("train.attention.flex_attention_forward", lambda *_, **__: called.append("flex"))
    monkeypatch.setattr("train.attention.sdpa_attention_forward", lambda *_, **__: called.append("sdpa"))
    (batch,) = pack(random_rows(4, 2), 10**6)
    for mask in (block_mask(batch), visible(batch), None):
        flex_or_sdpa(None, *[torch.ones(1, 1, 2, 4)] * 3, mask)
    assert called == ["flex", "sdpa", "sdpa"]


@pytest.mark.gpu
@pytest.mark.parametrize("full", [False, True], ids=["block", "full"])
def test_dense_and_flex_agree_on_a_gpu(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and gradients of the golden network, several trajectories joined in one row."""
    model = load_network(GOLDEN, "sdar", device="cuda")
    torch.set_float32_matmul_precision("highest")
    (batch,) = pack(random_rows(6, 12, full), 10**6)
    batch, results = joined(batch).to(torch.device("cuda")), []
    policy = Policy(model, MASK)
    for mask in (visible, block_mask):
        monkeypatch.setattr(network_module, "attention_mask", mask)
        logp, _ = policy(batch)
        results.append((logp.detach(), torch.autograd.grad(logp.sum(), list(model.parameters()))))
    (dense, wanted), (flex, found) = results
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-4)
    for one, other in zip(found, wanted):
        assert (one - other).abs().max() <= 1e-3 * other.abs().max()
