"""The engine's memory: commits that ride along, prompts shared, room that runs out, requests that never fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample.block_attention
import sample.network
from benchmarks.plain_loop import Clock, plain_loop
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model
from models.tiny import build_tiny
from sample.block_attention import prefill_groups
from sample.cache import KeyValueCache, Room
from sample.engine import Engine
from sample.network import Network
from tests.reference import sample_block_attention

BOUNDS = {"dynamic_threshold": 0.1, "eb_threshold": 6.5}  # both cut both ways on an untrained network
STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded")


@pytest.fixture(scope="module")
def tiny(tiny_sdar: Path) -> LoadedModel:
    return load_model(tiny_sdar, "sdar")


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + 7 * i) % 33 for i in range(length)]


def requests_of(*lengths: int) -> list[Request]:
    return [Request(f"task {n}", prompt(length, n), sample=n) for n, length in enumerate(lengths)]


def run(engine: Engine, requests: list[Request], settings: Sampling) -> dict[str, Trajectory]:
    got = {trajectory.task_id: trajectory for trajectory in engine.generate(requests, settings)}
    assert got.keys() == {request.task_id for request in requests}
    return got


def check(got: Trajectory, expected: Trajectory) -> None:
    for name in ("response_ids", "step_map", "finish_reason", "length", "steps", "forwards"):
        assert getattr(got, name) == getattr(expected, name), name
    for name in ("logp", "confidence", "kept_mass"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=0, abs=1e-5), name


# ---- commits


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_commit_apart_or_riding_along_gives_the_reference(
    tiny: LoadedModel, strategy: str, merge: bool, temperature: float
) -> None:
    settings = Sampling(
        max_token=14, remasking_strategy=strategy, merge_commit=merge, temperature=temperature, max_active=2, **BOUNDS
    )
    requests = requests_of(9, 3, 12)
    got = run(Engine(tiny.model, tiny.mask_id, [14]), requests, settings)
    for request in requests:
        check(got[request.task_id], sample_block_attention(tiny.model, tiny.mask_id, [14], request, settings))


@pytest.mark.parametrize("settings", [{}, {"remasking_strategy": "low_confidence_static", "temperature": 0.0}], ids=str)
def test_the_benchmarks_plain_loop_is_the_engine(tiny: LoadedModel, settings: dict) -> None:
    settings = Sampling(max_token=16, dynamic_threshold=0.1, **settings)
    for request in requests_of(9, 8, 2):
        clock = Clock()
        ids, step_map, logp = plain_loop(tiny.model, tiny.mask_id, [14], request, settings, clock)
        got = run(Engine(tiny.model, tiny.mask_id, [14]), [request], settings)[request.task_id]
        assert (ids, step_map) == (got.response_ids, got.step_map)
        assert logp == pytest.approx(got.logp, rel=0, abs=1e-5)
        assert clock.calls == got.forwards + (len(request.prompt_ids) % 4 + len(ids)) // 4 - 1  # its commits apart


def test_forwards_per_token_are_one(tiny: LoadedModel) -> None:
    settings = Sampling(max_token=32, remasking_strategy="low_confidence_static")
    got = run(Engine(tiny.model, tiny.mask_id, []), requests_of(8, 16), settings)
    assert [t.forwards for t in got.values()] == [32, 32]
    apart = run(Engine(tiny.model, tiny.mask_id, []), requests_of(8, 16), replace(settings, merge_commit=False))
    assert [t.forwards for t in apart.values()] == [39, 39]  # a commit for each block but the last


# ---- prompts


def test_samples_of_a_prompt_share_its_prefill(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled = []

    def counted(network, ids, positions, attention):
        if isinstance(attention, sample.network.OwnKeys):  # under block attention only a prefill has no older keys
            prefilled.extend(ids.tolist())
        return forward(network, ids, positions, attention)

    forward = Network.forward
    monkeypatch.setattr(Network, "forward", counted)
    requests = [Request(f"{task}-{n}", prompt(13, task), sample=n) for task in range(2) for n in range(4)]
    settings = Sampling(max_token=9, max_active=3, **BOUNDS)
    got = run(Engine(tiny.model, tiny.mask_id, []), requests, settings)
    assert len(prefilled) < len(requests) and {len(prefix) for prefix in prefilled} == {12}
    monkeypatch.setattr(Network, "forward", forward)
    for request in requests:
        check(got[request.task_id], run(Engine(tiny.model, tiny.mask_id, []), [request], settings)[request.task_id])


def test_many_prompts_are_prefilled_in_pieces(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(Engine(tiny.model, tiny.mask_id, []), requests_of(40, 3, 9, 22), Sampling(max_token=6))
    sizes = []
    forward = Network.forward
    monkeypatch.setattr(sample.block_attention, "PREFILL_TOKENS", 48)
    monkeypatch.setattr(Network, "forward", lambda *a: sizes.append(a[1].numel()) or forward(*a))
    pieces = run(Engine(tiny.model, tiny.mask_id, []), requests_of(40, 3, 9, 22), Sampling(max_token=6))
    assert max(sizes[:2]) <= 48 and sizes[:2] == [40, 40]  # one of 40; of 20 and 8 together
    for task, trajectory in pieces.items():
        check(trajectory, whole[task])


def test_prompts_of_like_lengths_are_prefilled_together() -> None:
    lengths = {5: 20, 0: 64, 1: 60, 2: 36, 3: 60, 4: 8}
    assert prefill_groups(lengths, torch.device("cpu")) == [([0, 1, 3], 64), ([2, 5], 36), ([4], 8)]
    assert prefill_groups(lengths, torch.device("cuda")) == [([0, 1, 3, 2, 5, 4], 64)]
    far = dict(enumerate((1000, 900, 400, 130)))
    assert prefill_groups(far, torch.device("cuda")) == [([0, 1], 1024), ([2, 3], 448)]
    assert prefill_groups({}, torch.device("cpu")) == []


def test_who_comes_takes_the_row_that_was_left(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, copy = [], KeyValueCache.copy

    def watched(cache: KeyValueCache, *args: object) -> None:
        moved.append(bool(engine.queue))
        copy(cache, *args)

    monkeypatch.setattr(KeyValueCache, "copy", watched)
    engine, requests = Engine(tiny.model, tiny.mask_id, [14]), requests_of(*range(3, 17))
    got = run(engine, requests, Sampling(max_token=12, max_active=4, dynamic_threshold=0.1))
    assert moved and not any(moved), "a row was moved while others waited"
    for request in requests[::5]:
        alone = run(Engine(tiny.model, tiny.mask_id, [14]), [request], Sampling(max_token=12, dynamic_threshold=0.1))
        check(got[request.task_id], alone[request.task_id])


# ---- room


def test_slots_widen_in_place(tiny: LoadedModel) -> None:
    cache = KeyValueCache(tiny.model, tokens=100, width=20)
    for number, store in enumerate((*cache.keys, *cache.values)):
        store.copy_(torch.arange(101.0)[:, None, None].expand_as(store) + 1000 * number)
    for width, kept in ((33, 20), (25, 20)):
        cache.resize(width, rows=3)
        for number, store in enumerate((*cache.keys, *cache.values)):
            rows = store[: 3 * width, 0, 0].view(3, width)[:, :kept]
            assert torch.equal(rows, torch.arange(60.0).view(3, 20) + 1000 * number)
    assert cache.slots[0][0].shape[:2] == (4, 25)


def test_room_is_arithmetic() -> None:
    assert Room(tokens=1000, rows=4, longest=250).width(3) == 250  # all fit at their longest: nothing ever changes
    tight = Room(tokens=300, rows=4, longest=250)
    assert [tight.width(reach) for reach in (3, 64, 65, 129)] == [64, 64, 128, 250]
    assert tight.fits([10, 60, 64, 20]) and not tight.fits([10, 65, 10]) and not tight.fits([1] * 5)
    assert tight.fits([250]) and not tight.fits([200, 1])


@pytest.fixture(scope="module")
def long_ones(tiny: LoadedModel) -> dict[str, Trajectory]:
    settings = Sampling(max_token=80, dynamic_threshold=0.04)
    return run(Engine(tiny.model, tiny.mask_id, [14]), requests_of(30, 9, 50, 22, 13), settings)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("tokens", [132, 260])
def test_sequences_that_give_way_lose_nothing(
    tiny: LoadedModel, long_ones: dict[str, Trajectory], tokens: int, merge: bool
) -> None:
    settings = Sampling(max_token=80, dynamic_threshold=0.04, cache_tokens=tokens, merge_commit=merge)
    engine, requests = Engine(tiny.model, tiny.mask_id, [14]), requests_of(30, 9, 50, 22, 13)
    waited = []

    def on_step() -> None:
        # how full the cache is, and who gave way, no call of the door says
        waited.extend(sequence.id for sequence in engine.waiting if sequence.state is not None)
        assert len(engine.seated) * engine.cache.width <= tokens

    got = {t.task_id: t for t in engine.generate(requests, settings, on_step)}
    assert waited and got.keys() == long_ones.keys()
    for task, trajectory in got.items():
        expected = long_ones[task]
        blocks = (len(expected.prompt_ids) % 4 + len(expected.response_ids)) // 4
        check(trajectory, replace(expected, forwards=expected.steps + (0 if merge else blocks - 1)))


def test_what_can_never_fit_is_refused_alone(tiny: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Sampling(max_token=10, cache_tokens=40, **BOUNDS)
    requests = requests_of(5, 30, 31, 28)  # with the last block: 16, 40, 44, 40
    got = run(Engine(tiny.model, tiny.mask_id, []), requests, settings)
    assert [got[f"task {n}"].finish_reason for n in range(4)] == ["length", "length", "refused", "length"]
    refused = got["task 2"]
    assert (refused.response_ids, refused.length, refused.steps, refused.prompt_ids) == ([], 0, 0, prompt(31, 2))
    line = capsys.readouterr().out.strip()
    assert "\n" not in line and "1 request" in line and "44" in line and "rollout.cache_tokens" in line
    for task in ("task 0", "task 1", "task 3"):
        check(
            got[task],
            run(Engine(tiny.model, tiny.mask_id, []), [r for r in requests if r.task_id == task], settings)[task],
        )
    assert [t.finish_reason for t in Engine(tiny.model, tiny.mask_id, []).generate(requests[2:3], settings)] == [
        "refused"
    ]


def test_many_requests_through_little_room(tiny: LoadedModel) -> None:
    settings = Sampling(max_token=4, max_active=8, cache_tokens=160, dynamic_threshold=0.0)
    requests = [Request(str(n), prompt(1 + 31 * n % 60), sample=n) for n in range(120)]
    engine = Engine(tiny.model, tiny.mask_id, [])
    got = run(engine, requests, settings)
    assert {t.finish_reason for t in got.values()} == {"length"} and {t.length for t in got.values()} == {4}
    assert engine.cache.tokens == 160 and len(engine.slots.views) <= 9
    for request in requests[::30]:
        check(got[request.task_id], run(Engine(tiny.model, tiny.mask_id, []), [request], settings)[request.task_id])


@pytest.mark.parametrize("cache", [{"use_cache": True}, {"use_cache": True, "further_horizon": 3}, {}], ids=str)
def test_full_attention_keeps_within_its_room(tmp_path: Path, cache: dict) -> None:
    build_tiny("llada", tmp_path, seed=3)
    loaded = load_model(tmp_path, "llada")
    settings = Sampling(max_token=16, block_size=8, steps=12, **cache)
    free = run(Engine(loaded.model, loaded.mask_id, []), requests_of(5, 9, 17, 30), settings)
    tight = run(Engine(loaded.model, loaded.mask_id, []), requests_of(5, 9, 17, 30), replace(settings, cache_tokens=60))
    for task, trajectory in tight.items():
        check(trajectory, free[task])


# ---- sleep


def test_sleep_gives_the_memory_back_and_changes_nothing(tiny: LoadedModel) -> None:
    engine, settings = Engine(tiny.model, tiny.mask_id, []), Sampling(max_token=8, **BOUNDS)
    before = run(engine, requests_of(6, 9), settings)
    tokens = engine.cache.tokens
    for wake in (True, False):
        engine.sleep()
        assert engine.cache is None and engine.slots is None
        if wake:
            engine.wake()
            assert engine.cache.tokens == tokens
        assert run(engine, requests_of(6, 9), settings) == before


def test_the_network_attends_as_before_when_the_engine_is_done(tiny: LoadedModel) -> None:
    ids = torch.tensor([prompt(9)])
    with torch.no_grad():
        before = tiny.model(ids).logits
        during = []
        engine = Engine(tiny.model, tiny.mask_id, [])
        run_while = engine.generate(
            requests_of(6), Sampling(max_token=4), lambda: during.append(tiny.model(ids).logits.clone())
        )
        list(run_while)
        assert torch.equal(tiny.model(ids).logits, before)
    assert tiny.model.config._attn_implementation == "sdpa"
    assert during and all(torch.equal(logits, before) for logits in during)  # its own calls are not the engine's


# ---- the network's layers


@pytest.mark.parametrize("family", ["sdar", "dream", "llada", "sdar_moe", "llada2"])
def test_a_layer_by_its_parts_is_the_layer(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit; and a layer of a class that is not known is called as it is."""
    build_tiny(family, tmp_path, seed=5)
    model = load_model(tmp_path, family).model
    for name, weight in model.named_parameters():  # norms and biases start alike in every layer
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    ids, positions = torch.randint(0, 30, (9, 12)), torch.arange(12).expand(9, -1)
    attention = sample.network.OwnKeys(sample.network.bias_of(torch.rand(9, 1, 12, 12) > 0.3, torch.float32))
    network = Network(model, positions=12)
    with torch.inference_mode(), sample.network.engine_attention(model):
        parts = network.forward(ids, positions, attention)
        assert all(isinstance(layer, sample.network.PRE_NORM) for layer in model.model.layers)
        monkeypatch.setattr(sample.network, "PRE_NORM", ())
        whole = network.forward(ids, positions, attention)
    assert torch.equal(parts, whole)
