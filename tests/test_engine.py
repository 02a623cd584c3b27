"""The sampler against the plain one of tests/reference.py, and what a batch, a limit or a stop token may not change."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model, load_network
from models.tiny import build_tiny
from sample.engine import Engine
from tests.reference import Trace, sample_block_attention, uniform_of

GOLDEN = Path(__file__).parent / "golden" / "sdar"
GOLDEN_CASES = json.loads((GOLDEN / "expected.json").read_text())["cases"]
DRAWS = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "filtered": {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
}
MASKED_ONLY = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded")
# of an untrained network: confidence is 0.02 to 0.25 and entropy about 3 nats, so these bounds cut both ways
BOUNDS = {"dynamic_threshold": 0.1, "eb_threshold": 6.5}


@pytest.fixture(scope="module")
def tiny(tiny_sdar: Path) -> LoadedModel:
    return load_model(tiny_sdar, "sdar")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("other_sdar")
    build_tiny("sdar", folder, seed=4)
    return load_model(folder, "sdar")


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + 7 * i) % 33 for i in range(length)]


def requests_of(*lengths: int, seed: int = 0) -> list[Request]:
    return [Request(f"task {n}", prompt(length, n), sample=n, seed=seed, step=2) for n, length in enumerate(lengths)]


def engine_of(loaded: LoadedModel, stop_ids: Iterable[int] = ()) -> Engine:
    return Engine(loaded.model, loaded.mask_id, stop_ids)


def run(engine: Engine, requests: list[Request], settings: Sampling) -> dict[str, Trajectory]:
    """Trajectories by task."""
    trajectories = list(engine.generate(requests, settings))
    assert sorted(t.task_id for t in trajectories) == sorted(r.task_id for r in requests)
    return {t.task_id: t for t in trajectories}


def one(engine: Engine, ids: list[int], settings: Sampling) -> Trajectory:
    return run(engine, [Request("one", ids)], settings)["one"]


def check(got: Trajectory, expected: Trace | Trajectory) -> None:
    """Ids, step map, end and counts are equal; the floats are to 1e-5."""
    for name in ("response_ids", "step_map", "finish_reason", "length", "steps", "forwards"):
        assert getattr(got, name) == getattr(expected, name), name
    for name in ("logp", "confidence", "kept_mass"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=0, abs=1e-5), name
    assert [one[:3] for one in got.overwritten] == [one[:3] for one in expected.overwritten]
    logp = [one.logp for one in expected.overwritten]
    assert [one.logp for one in got.overwritten] == pytest.approx(logp, rel=0, abs=1e-5)


# ---- against the reference


@pytest.mark.parametrize("block, steps", [(4, 4), (4, 2), (4, 3), (8, 4), (8, 2), (8, 3)])
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("strategy", MASKED_ONLY)
def test_equals_the_reference(tiny: LoadedModel, strategy: str, draw: str, block: int, steps: int) -> None:
    settings = Sampling(
        block_size=block,
        denoising_steps_per_block=steps,
        max_token=9,
        remasking_strategy=strategy,
        **DRAWS[draw],
        **BOUNDS,
    )
    # a multiple of the block; not one; in every other case shorter than a block
    requests = requests_of(8, 13 if steps % 2 else 3, seed=steps)
    got = run(engine_of(tiny), requests, settings)
    for request in requests:
        check(got[request.task_id], sample_block_attention(tiny.model, tiny.mask_id, [], request, settings))
        assert got[request.task_id].prompt_ids == request.prompt_ids
        assert got[request.task_id].sample == request.sample
        assert got[request.task_id].temperature == (settings.temperature or 1)


def test_equals_the_reference_where_confidence_is_of_the_filtered_softmax(tiny: LoadedModel) -> None:
    settings = Sampling(max_token=12, confidence_from="sampled", dynamic_threshold=0.4, **DRAWS["filtered"])
    request = Request("a", prompt(6))
    check(
        one_of(run(engine_of(tiny), [request], settings)),
        sample_block_attention(tiny.model, tiny.mask_id, [], request, settings),
    )
    greedy = one(engine_of(tiny), prompt(6), replace(settings, top_k=1, dynamic_threshold=1.0))
    assert set(greedy.confidence) == {1.0}
    assert greedy.steps == 4  # the prompt's block and three more, each unmasked at once


def one_of(trajectories: dict[str, Trajectory]) -> Trajectory:
    (trajectory,) = trajectories.values()
    return trajectory


def golden_settings(case: dict) -> Sampling:
    return Sampling(
        block_size=case["block_size"],
        denoising_steps_per_block=case["denoising_steps"],
        max_token=case["gen_length"],
        temperature=0.0,
        remasking_strategy=case["remasking_strategy"],
        dynamic_threshold=case["threshold"],
    )


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case["prompt"])
def test_golden_responses(case: dict) -> None:
    model, expected = load_network(GOLDEN, "sdar"), load_file(GOLDEN / "expected.safetensors")
    ids, settings = expected[case["prompt"]].tolist(), golden_settings(case)
    got = one(Engine(model, model.config.mask_token_id, []), ids, settings)
    assert ids + got.response_ids == expected[case["tokens"]].tolist()
    check(got, sample_block_attention(model, model.config.mask_token_id, [], Request("one", ids), settings))


def test_golden_responses_in_one_batch() -> None:
    model, expected = load_network(GOLDEN, "sdar"), load_file(GOLDEN / "expected.safetensors")
    case = GOLDEN_CASES[0]
    requests = [Request(f"prompt_{n}", expected[f"prompt_{n}"].tolist()) for n in range(5)]
    got = run(Engine(model, model.config.mask_token_id, []), requests, golden_settings(case))[case["prompt"]]
    assert got.prompt_ids + got.response_ids == expected[case["tokens"]].tolist()


# ---- a response does not depend on its company


NINE = (3, 8, 13, 4, 9, 1, 22, 6, 17)


@pytest.fixture(scope="module")
def alone(tiny: LoadedModel) -> dict[str, Trajectory]:
    engine = engine_of(tiny, [14])
    return {r.task_id: one_of(run(engine, [r], Sampling(max_token=14, **BOUNDS))) for r in requests_of(*NINE)}


@pytest.mark.parametrize("max_active", [1, 3, 9, 256])
@pytest.mark.parametrize("turned", [False, True])
def test_a_response_is_the_same_alone_and_in_any_batch(
    tiny: LoadedModel, alone: dict[str, Trajectory], max_active: int, turned: bool
) -> None:
    requests = requests_of(*NINE)[:: -1 if turned else 1]
    settings = Sampling(max_token=14, max_active=max_active, **BOUNDS)
    got = run(engine_of(tiny, [14]), requests, settings)
    for task, trajectory in got.items():
        check(trajectory, alone[task])
    ends = {(t.finish_reason, t.length) for t in got.values()}
    assert len(ends) > 2  # they do finish at different times, so that slots are refilled and moved


def test_samples_of_a_task_differ_and_repeat(tiny: LoadedModel) -> None:
    settings = Sampling(max_token=8)
    variants = {
        "itself": Request("a", prompt(5)),
        "sample": Request("a", prompt(5), sample=1),
        "seed": Request("a", prompt(5), seed=1),
        "step": Request("a", prompt(5), step=1),
        "task": Request("b", prompt(5)),
    }
    got = {name: one_of(run(engine_of(tiny), [request], settings)) for name, request in variants.items()}
    assert len({tuple(t.response_ids) for t in got.values()}) == len(variants)
    assert one_of(run(engine_of(tiny), [variants["itself"]], settings)) == got["itself"]


def test_no_request_no_response(tiny: LoadedModel) -> None:
    assert list(engine_of(tiny).generate([], Sampling())) == []


def test_an_empty_prompt(tiny: LoadedModel) -> None:
    # masks alone look alike at every position, so that confidence cannot tell them apart
    request, settings = Request("a", []), Sampling(max_token=6, remasking_strategy="sequential")
    got = run(engine_of(tiny), [request, *requests_of(9)], settings)["a"]
    check(got, sample_block_attention(tiny.model, tiny.mask_id, [], request, settings))


# ---- where a response ends


@pytest.fixture(scope="module")
def free(tiny: LoadedModel) -> Trajectory:
    """A response that nothing stops, of which a token in the middle of a block occurs there first."""
    return one(engine_of(tiny), prompt(6), Sampling(max_token=18))


def first_met(response: list[int], inside: range) -> int:
    """An index within `inside` at which a token occurs for the first time."""
    return next(i for i in inside if response[i] not in response[:i])


def test_a_stop_token_ends_the_response_and_the_block_is_kept_whole(tiny: LoadedModel, free: Trajectory) -> None:
    # the prompt's 6 tokens leave 2 of its block, so response blocks begin at 2, 6, 10, 14
    at = first_met(free.response_ids, range(6, 9))
    got = one(engine_of(tiny, [free.response_ids[at]]), prompt(6), Sampling(max_token=18))
    assert (got.finish_reason, got.length) == ("stop", at + 1)
    assert got.response_ids == free.response_ids[:10]  # tokens behind the stop included
    assert got.step_map == free.step_map[:10]
    request = Request("one", prompt(6))
    stops = [free.response_ids[at]]
    check(got, sample_block_attention(tiny.model, tiny.mask_id, stops, request, Sampling(max_token=18)))


def test_the_first_of_several_stop_tokens_counts(tiny: LoadedModel, free: Trajectory) -> None:
    early, late = first_met(free.response_ids, range(2, 6)), first_met(free.response_ids, range(7, 14))
    stops = [free.response_ids[late], free.response_ids[early]]
    got = one(engine_of(tiny, stops), prompt(6), Sampling(max_token=18))
    assert (got.finish_reason, got.length, len(got.response_ids)) == ("stop", early + 1, 6)


def test_a_stop_token_counts_only_once_its_block_is_clean(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # unmasked from the right, every token is a stop token: the response is the first block, and its first token ends it
    (tmp_path / "rightmost.py").write_text(
        "def rightmost(candidates, confidence, entropy, masked, k, uniform, settings):\n"
        "    return masked & (masked.flip(1).cumsum(1).flip(1) == 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = Sampling(max_token=12, remasking_strategy="rightmost:rightmost")
    got = one(engine_of(tiny, range(38)), prompt(4), settings)
    assert got.step_map == [3, 2, 1, 0]
    assert (got.finish_reason, got.length) == ("stop", 1)


def test_stop_tokens_in_the_prompt_end_nothing(tiny: LoadedModel, free: Trajectory) -> None:
    # the last two of the prompt's tokens stand in the first generated block
    stop = next(token for token in range(33) if token not in free.response_ids)
    got = one(engine_of(tiny, [stop]), [*prompt(4), stop, stop], Sampling(max_token=4))
    assert (got.finish_reason, got.length, len(got.response_ids)) == ("length", 4, 6)
    assert stop not in got.response_ids


def test_a_stop_token_beyond_the_limit_does_not_count(tiny: LoadedModel, free: Trajectory) -> None:
    at = first_met(free.response_ids, range(7, 10))  # of the block that begins at 6, so that either limit cuts it
    engine = engine_of(tiny, [free.response_ids[at]])
    beyond, at_limit = (one(engine, prompt(6), Sampling(max_token=limit)) for limit in (at, at + 1))
    assert (beyond.finish_reason, beyond.length) == ("length", at)
    assert (at_limit.finish_reason, at_limit.length) == ("stop", at + 1)
    assert beyond.response_ids[:6] == free.response_ids[:6]


@pytest.mark.parametrize(
    "length, limit, kept",
    [(8, 8, 8), (8, 6, 8), (8, 1, 4), (6, 2, 2), (6, 4, 6), (6, 1, 2), (7, 10, 13), (2, 2, 2), (2, 3, 6)],
)
def test_the_limit_counts_response_tokens_and_the_last_block_is_whole(
    tiny: LoadedModel, free: Trajectory, length: int, limit: int, kept: int
) -> None:
    request, settings = Request("one", prompt(length)), Sampling(max_token=limit)
    got = run(engine_of(tiny), [request], settings)["one"]
    assert (got.finish_reason, got.length, len(got.response_ids)) == ("length", limit, kept)
    assert len(got.step_map) == len(got.logp) == len(got.confidence) == kept
    assert min(got.step_map) == 0  # nothing of the prompt's block is counted as drawn
    check(got, sample_block_attention(tiny.model, tiny.mask_id, [], request, settings))


def test_no_room_for_a_response_is_said(tiny: LoadedModel) -> None:
    with pytest.raises(UserError, match="max_token"):
        one(engine_of(tiny), prompt(3), Sampling(max_token=0))


# ---- what a trajectory counts


def test_static_takes_a_step_per_token(tiny: LoadedModel) -> None:
    settings = Sampling(max_token=12, remasking_strategy="low_confidence_static")
    got = one(engine_of(tiny), prompt(8), settings)
    assert got.steps == 12
    assert got.forwards == 12  # commits ride along
    apart = one(engine_of(tiny), prompt(8), replace(settings, merge_commit=False))
    assert apart.forwards == 12 + 2  # the last of three blocks is not committed
    assert sorted(got.step_map) == list(range(12))
    assert [sorted(got.step_map[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert one(engine_of(tiny), prompt(8), replace(settings, denoising_steps_per_block=2)).steps == 6
    assert one(engine_of(tiny), prompt(7), replace(settings, max_token=9)).steps == 1 + 8


def test_dynamic_without_a_threshold_takes_a_step_per_block(tiny: LoadedModel) -> None:
    settings = Sampling(max_token=12, dynamic_threshold=0.0)
    got = one(engine_of(tiny), prompt(8), settings)
    assert (got.steps, got.forwards) == (3, 3)
    assert got.step_map == [0] * 4 + [1] * 4 + [2] * 4


def test_on_step_is_called_at_every_forward_of_the_batch(tiny: LoadedModel) -> None:
    calls: list[None] = []
    settings = Sampling(max_token=8, remasking_strategy="low_confidence_static")
    (got,) = engine_of(tiny).generate([Request("a", prompt(4))], settings, lambda: calls.append(None))
    assert len(calls) == got.forwards


def test_responses_are_yielded_as_they_finish(tiny: LoadedModel) -> None:
    # beside a prompt that leaves 1 of its block, one that leaves 4 takes longer
    settings = Sampling(max_token=1, remasking_strategy="low_confidence_static")
    order = [t.task_id for t in engine_of(tiny).generate(requests_of(4, 7), settings)]
    assert order == ["task 1", "task 0"]


@pytest.mark.parametrize("draw", DRAWS)
def test_the_mask_token_is_never_drawn(tiny: LoadedModel, draw: str, request: pytest.FixtureRequest) -> None:
    def wants_the_mask(head: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> torch.Tensor:
        logits[..., tiny.mask_id] += 20
        return logits

    hook = tiny.model.lm_head.register_forward_hook(wants_the_mask)
    request.addfinalizer(hook.remove)
    for trajectory in run(engine_of(tiny), requests_of(5, 8), Sampling(max_token=12, **DRAWS[draw])).values():
        assert tiny.mask_id not in trajectory.response_ids
        assert max(trajectory.confidence) < 1e-3  # the raw softmax still holds the mask token
        assert min(trajectory.logp) > -12  # and logp does not


# ---- the door: requests come, are looked at and cancelled one by one


def test_requests_come_at_any_time_and_can_be_cancelled(tiny: LoadedModel) -> None:
    """What each gains from step to step adds up to its trajectory; ids say whose it is; nobody notices who left."""
    engine, requests, settings = engine_of(tiny), requests_of(3, 8, 13, 5), Sampling(max_token=14, max_active=2)
    engine.set_up(settings, requests)
    assert engine.add([]) == [] and not engine.busy and not engine.step() and engine.finished() == []
    ids = engine.add(requests[:3])
    gained: dict[int, list[tuple[int, float]]] = {}
    done: dict[int, Trajectory] = {}
    for step in range(200):
        if step == 3:
            ids += engine.add(requests[3])
            engine.cancel(ids[0])  # drawn
            engine.cancel(ids[2])  # waiting
        if not engine.busy:
            break
        assert engine.step()
        for progress in engine.progress():
            gained.setdefault(progress.id, []).extend(zip(progress.tokens, progress.logp))
            present = [token for token, masked in progress.block if masked]
            assert len(progress.block) <= 4 and set(present) <= {tiny.mask_id}
        for finished in engine.finished():
            assert finished.error is None and finished.refusal is None
            done[finished.id] = finished.trajectory
    assert len(set(ids)) == 4 and set(done) == {ids[1], ids[3]}
    for number in (1, 3):
        trajectory = done[ids[number]]
        check(trajectory, one_of(run(engine_of(tiny), [requests[number]], settings)))
        count = len(gained[ids[number]])  # all but the last block, which comes with the trajectory
        assert count >= len(trajectory.response_ids) - 4
        assert gained[ids[number]] == list(zip(trajectory.response_ids, trajectory.logp))[:count]


@pytest.mark.parametrize("isolate", [True, False])
def test_a_fault_is_raised_or_ends_the_request_that_makes_it(tiny: LoadedModel, isolate: bool) -> None:
    engine = Engine(tiny.model, tiny.mask_id, (), isolate_faults=isolate)
    requests, settings = requests_of(6, 9, 5, 10), Sampling(max_token=6, dynamic_threshold=0.1)
    bad = requests[2].prompt_ids[-1]

    def fails(module: torch.nn.Module, inputs: tuple) -> None:
        if (inputs[0][:, 0] == bad).any():  # the prompt's last token begins its first block
            raise MemoryError("poisoned")

    hook = tiny.model.model.embed_tokens.register_forward_pre_hook(fails)
    engine.set_up(settings, requests)
    ids, done = engine.add(requests), {}
    try:
        if not isolate:
            with pytest.raises(MemoryError):
                engine.step()
            return
        while engine.busy:
            engine.step()
            done |= {finished.id: finished for finished in engine.finished()}
    finally:
        hook.remove()
    assert isinstance(done[ids[2]].error, MemoryError) and done[ids[2]].trajectory is None
    for number in (0, 1, 3):
        check(done[ids[number]].trajectory, one_of(run(engine_of(tiny), [requests[number]], settings)))


def test_a_refusal_says_what_it_needs(tiny: LoadedModel) -> None:
    engine, settings = engine_of(tiny), Sampling(max_token=8, cache_tokens=24)
    engine.set_up(settings, requests_of(16))
    fits, refused = engine.add(requests_of(9, 33))
    done: dict = {}
    while engine.busy:
        engine.step()
        done |= {finished.id: finished for finished in engine.finished()}
    assert done[fits].trajectory.finish_reason == "length" and done[fits].refusal is None
    assert (done[refused].refusal.needed, done[refused].refusal.room) == (44, 24)
    assert done[refused].trajectory.finish_reason == "refused"
    engine.set_up(settings, [])  # room for nothing
    engine.add(requests_of(9))
    assert not engine.step() and [finished.refusal.room for finished in engine.finished()] == [0] and not engine.busy


# ---- strategies of the user's own, and names that are none


def test_a_strategy_of_the_users_own(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "by_chance.py").write_text(
        "def likeliest(candidates, confidence, entropy, masked, k, uniform, settings):\n"
        "    '''One position a step, by the random number.'''\n"
        "    assert confidence is candidates.probability and entropy is candidates.entropy\n"
        "    assert masked.dtype.is_floating_point is False and k.shape == masked.shape[:1]\n"
        "    assert settings.block_size == masked.shape[1]\n"
        "    best = uniform.masked_fill(~masked, -1).argmax(1, keepdim=True)\n"
        "    return masked.new_zeros(masked.shape).scatter(1, best, True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = Sampling(max_token=8, remasking_strategy="by_chance:likeliest")
    together = run(engine_of(tiny), requests_of(4, 6, 8), settings)
    for request in requests_of(4, 6, 8):
        check(run(engine_of(tiny), [request], settings)[request.task_id], together[request.task_id])
    request, expected = requests_of(4)[0], {}
    for step in range(8):
        masked = [i for i in (range(4, 8) if step < 4 else range(8, 12)) if i not in expected]
        expected[max(masked, key=lambda i: uniform_of(request, i, step, "random"))] = step
    assert together["task 0"].step_map == [expected[i] for i in range(4, 12)]


def test_a_strategy_may_not_touch_what_is_not_masked(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greedy_hands.py").write_text(
        "def everything(*arguments):\n    return arguments[3].new_ones(arguments[3].shape)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = Sampling(max_token=6, remasking_strategy="greedy_hands:everything")
    request = Request("a", prompt(6))
    got = run(engine_of(tiny), [request], settings)["a"]
    check(
        got, sample_block_attention(tiny.model, tiny.mask_id, [], request, Sampling(max_token=6, dynamic_threshold=0))
    )


def test_a_strategy_that_unmasks_nothing_is_an_error_and_no_hang(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lazy_hands.py").write_text("def nothing(*arguments):\n    return arguments[3] & False\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings, calls = Sampling(max_token=8, remasking_strategy="lazy_hands:nothing"), []

    def on_step() -> None:
        calls.append(None)
        assert len(calls) < 50

    with pytest.raises(UserError, match=r"lazy_hands:nothing.*unmasked nothing") as caught:
        list(engine_of(tiny).generate(requests_of(4, 6), settings, on_step))
    assert "\n" not in str(caught.value)


def test_an_unknown_strategy_is_an_error(tiny: LoadedModel) -> None:
    with pytest.raises(UserError, match="low_confidence_static"):
        one(engine_of(tiny), prompt(4), Sampling(remasking_strategy="low_confidence"))


# ---- one engine, many uses


def test_an_engine_is_used_again_with_other_prompts_and_settings(tiny: LoadedModel) -> None:
    engine = engine_of(tiny)
    uses = [
        (requests_of(3, 5), Sampling(max_token=6)),
        (requests_of(30, 17, 8, seed=1), Sampling(max_token=10, block_size=8, denoising_steps_per_block=3)),
        (requests_of(4, 9, 2, seed=2), Sampling(max_token=5, max_active=2, **DRAWS["filtered"])),
        (requests_of(6), Sampling(max_token=33, dynamic_threshold=0.05)),
    ]
    for requests, settings in uses:
        fresh = run(engine_of(tiny), requests, settings)
        for task, trajectory in run(engine, requests, settings).items():
            check(trajectory, fresh[task])


def test_an_engine_is_used_again_after_its_caller_left_early(tiny: LoadedModel) -> None:
    engine, settings = engine_of(tiny), Sampling(max_token=12, max_active=2)
    next(engine.generate(requests_of(7, 4, 5), settings))
    assert engine.busy  # work is left over
    fresh = run(engine_of(tiny), requests_of(9, 6, seed=1), settings)
    for task, trajectory in run(engine, requests_of(9, 6, seed=1), settings).items():
        check(trajectory, fresh[task])


def test_weights_are_loaded_in_place(tiny_sdar: Path, other: LoadedModel) -> None:
    mine = load_model(tiny_sdar, "sdar")
    engine, settings = engine_of(mine), Sampling(max_token=8)
    before = one(engine, prompt(6), settings)
    expected = one(engine_of(other), prompt(6), settings)
    assert before.response_ids != expected.response_ids

    pointers = {name: tensor.data_ptr() for name, tensor in mine.model.named_parameters()}
    engine.load_weights((name, tensor.clone()) for name, tensor in other.model.named_parameters())
    assert {name: tensor.data_ptr() for name, tensor in mine.model.named_parameters()} == pointers
    assert one(engine, prompt(6), settings) == expected
    engine.load_weights(mine.model.named_parameters())  # its own: nothing to copy
    assert one(engine, prompt(6), settings) == expected


def test_some_weights_may_be_loaded(tiny_sdar: Path, other: LoadedModel) -> None:
    mine = load_model(tiny_sdar, "sdar")
    name = "model.norm.weight"
    engine_of(mine).load_weights([(name, torch.full_like(other.model.get_parameter(name), 2))])
    assert set(mine.model.get_parameter(name).tolist()) == {2.0}
    assert mine.model.get_parameter(name).requires_grad
