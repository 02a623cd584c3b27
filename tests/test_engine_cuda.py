"""What the engine does on CUDA: shapes that depend on nothing on the device, looks that come late, graphs.

The first two are held on the CPU, where they give the same responses; the last needs a GPU (`pytest -m gpu`).
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model
from models.tiny import build_tiny
from sample.draw import STREAMS, _hash, _shift_right, _signed, uniforms  # CUDA's form of the hash
from sample.engine import Engine
from sample.network import FOLD_FROM, bias_of, sdpa
from sample.slots import Slots
from sample.step import Graphs

SETTINGS = Sampling(max_token=14, max_active=3, dynamic_threshold=0.1)
LENGTHS = (3, 8, 13, 4, 9, 1, 22)


def requests_of(*lengths: int) -> list[Request]:
    return [Request(f"task {n}", [(n + 7 * i) % 33 for i in range(length)], n) for n, length in enumerate(lengths)]


def check_same(got: dict[str, Trajectory], expected: dict[str, Trajectory], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for task, one in expected.items():
        for name in ("response_ids", "step_map", "finish_reason", "length", "steps", "forwards"):
            assert getattr(got[task], name) == getattr(one, name), name
        assert got[task].logp == pytest.approx(one.logp, rel=0, abs=tolerance)


def run(engine: Engine, settings: Sampling, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Trajectory]:
    return {trajectory.task_id: trajectory for trajectory in engine.generate(requests_of(*lengths), settings)}


class LateWatch:
    """A look every third step, of what was so a step before."""

    def forget(self) -> None:
        self.calls, self.seen = 0, None

    def look(self, slots: Slots) -> tuple[list[list[int]], int] | None:
        self.calls += 1
        if self.calls % 3 == 2:
            self.seen = slots.status().tolist()
        if self.calls % 3 or self.seen is None:
            return None
        return self.seen, 1


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("tokens", [None, 80])
def test_fixed_shapes_and_late_looks_change_no_response(tiny_sdar: Path, merge: bool, tokens: int | None) -> None:
    loaded = load_model(tiny_sdar, "sdar")
    settings = replace(SETTINGS, merge_commit=merge, cache_tokens=tokens)
    expected = run(Engine(loaded.model, loaded.mask_id, [14]), settings)
    engine = Engine(loaded.model, loaded.mask_id, [14])
    engine.graphs, engine.watch = Graphs(), LateWatch()
    engine.graphs.usable = False  # shapes are rounded up as for a graph, and every step is run plainly
    check_same(run(engine, settings), expected)


@pytest.mark.parametrize("extra", [{}, {"use_cache": True}], ids=str)
def test_fixed_shapes_and_late_looks_under_full_attention(tmp_path: Path, extra: dict) -> None:
    build_tiny("dream", tmp_path, seed=3)
    loaded = load_model(tmp_path, "dream")
    settings = replace(SETTINGS, block_size=8, steps=12, **extra)
    expected = run(Engine(loaded.model, loaded.mask_id, [14]), settings)
    engine = Engine(loaded.model, loaded.mask_id, [14])
    engine.graphs, engine.watch = Graphs(), LateWatch()
    engine.graphs.usable = False
    check_same(run(engine, settings), expected)


def test_the_hash_is_the_same_in_torchs_words_and_numpys() -> None:
    key = torch.tensor([-5, 2**62, 0, 77])
    position, step = torch.arange(12).view(4, 3) * 1001, torch.tensor([0, 3, 9, 500])
    for stream, number in STREAMS.items():
        hashed = _hash(key, position, step, number, _shift_right, _signed)
        expected = _shift_right(hashed, 40).to(torch.float32) * 2.0**-24
        assert torch.equal(uniforms(key, position, step, stream), expected)


@pytest.mark.parametrize("queries", [1, 6])
def test_folding_heads_into_positions_changes_nothing(queries: int) -> None:
    torch.manual_seed(0)
    rows = FOLD_FROM
    query, key, value = torch.randn(rows, 8, 6, 16), torch.randn(rows, 2, 11, 16), torch.randn(rows, 2, 11, 16)
    bias = bias_of(torch.arange(11) < torch.arange(4, 4 + rows)[:, None, None, None], torch.float32)
    bias = bias.expand(-1, 1, queries, -1).clone()
    bias[:, :, -1, 0] = -1.0
    folded = sdpa(query, key, value, bias, 0.3)
    plain = [sdpa(*(each[row : row + 1] for each in (query, key, value, bias)), 0.3) for row in range(rows)]
    assert torch.allclose(torch.cat(plain), folded, atol=1e-6)
    assert folded.shape == (rows, 6, 8 * 16)


@pytest.fixture
def on_gpu(tiny_sdar: Path) -> LoadedModel:
    return load_model(tiny_sdar, "sdar", torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("merge", [True, False])
def test_graphs_give_what_single_kernels_give(on_gpu: LoadedModel, merge: bool) -> None:
    settings = replace(SETTINGS, merge_commit=merge, temperature=0.0)
    plain = Engine(on_gpu.model, on_gpu.mask_id, [14])
    plain.graphs.usable = False
    expected = run(plain, settings)
    engine = Engine(on_gpu.model, on_gpu.mask_id, [14])
    for _ in range(2):
        check_same(run(engine, settings), expected, tolerance=1e-4)
    assert engine.graphs.usable and engine.graphs.graphs


@pytest.mark.gpu
def test_graphs_follow_new_weights(on_gpu: LoadedModel, tmp_path: Path) -> None:
    build_tiny("sdar", tmp_path, seed=4)
    other = load_model(tmp_path, "sdar", torch.float32, "cuda")
    settings = replace(SETTINGS, temperature=0.0)
    engine = Engine(on_gpu.model, on_gpu.mask_id, [14])
    run(engine, settings)
    graphs = dict(engine.graphs.graphs)
    engine.load_weights((name, tensor.clone()) for name, tensor in other.model.named_parameters())
    check_same(run(engine, settings), run(Engine(other.model, other.mask_id, [14]), settings), tolerance=1e-4)
    assert all(engine.graphs.graphs[key] is graph for key, graph in graphs.items())


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["torch", "torch, spans", "flash-attn"])
def test_flash_attention_gives_what_the_bias_gives(
    on_gpu: LoadedModel, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "flash-attn":
        pytest.importorskip("flash_attn")
    lengths = LENGTHS
    if kernel == "torch, spans":
        monkeypatch.setattr("sample.network.SHORTEST_SPAN", 64)
        kernel, lengths = "torch", (300, 3, 150)
    model = on_gpu.model.to(torch.bfloat16)
    settings = replace(SETTINGS, temperature=0.0, remasking_strategy="sequential", max_token=4)
    flash, dense = (Engine(model, on_gpu.mask_id, []) for _ in range(2))
    assert flash.kernel != "bias"
    flash.kernel, dense.kernel = kernel, "bias"
    check_same(run(flash, settings, lengths), run(dense, settings, lengths), tolerance=0.05)
