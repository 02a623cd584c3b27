"""Sampling with full attention against the plain loop of tests/reference_full.py, for every family that has it."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import generate
from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model, load_network
from models.tiny import build_tiny
from sample.engine import Engine
from tests.reference_full import sample_full_attention

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("dream", "llada", "mmada")
STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded")
# of an untrained network: confidence is 0.02 to 0.25, entropy about 3 nats, so these bounds cut both ways
BASE = {"max_token": 16, "block_size": 8, "steps": 12, "dynamic_threshold": 0.1, "eb_threshold": 6.5}
CACHES = {"exact": {}, "cached": {"use_cache": True}, "horizon": {"use_cache": True, "further_horizon": 3}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("full")
    for family in FAMILIES:
        build_tiny(family, folder / family, seed=3)
    return {family: load_model(folder / family, family) for family in FAMILIES}


def prompt(length: int) -> list[int]:
    return [7 * i % 33 for i in range(length)]


def run(loaded: LoadedModel, requests: list[Request], settings: Sampling, stops: tuple[int, ...] = ()) -> dict:
    engine = Engine(loaded.model, loaded.mask_id, stops)
    return {trajectory.task_id: trajectory for trajectory in engine.generate(requests, settings)}


def check_against_reference(loaded: LoadedModel, settings: Sampling, stops: tuple[int, ...] = ()) -> None:
    requests = [Request(f"task {n}", prompt(n), seed=5) for n in (3, 9)]
    got = run(loaded, requests, settings, stops)
    for request in requests:
        one = got[request.task_id]
        expected = sample_full_attention(loaded.model, loaded.mask_id, list(stops), request, settings)
        for name in ("response_ids", "step_map", "finish_reason", "length", "steps", "forwards"):
            assert getattr(one, name) == getattr(expected, name), name
        for name in ("logp", "confidence"):
            assert getattr(one, name) == pytest.approx(getattr(expected, name), rel=0, abs=1e-5), name
        assert [writing[:3] for writing in one.overwritten] == [writing[:3] for writing in expected.overwritten]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_strategies(tiny, family, strategy, cache):
    settings = Sampling(**BASE, **CACHES[cache], remasking_strategy=strategy)
    check_against_reference(tiny[family], settings)


@pytest.mark.parametrize("strategy", ["factor", "hierarchical", "revoke"])
@pytest.mark.parametrize("family, cache", [("dream", "horizon"), ("llada", "exact")])
def test_strategies_without_a_schedule(tiny, family, cache, strategy):
    bounds = {"dynamic_threshold": 0.08, "low_threshold": 0.06, "revoke_threshold": 0.07, "factor": 2.8}
    settings = Sampling(**BASE | bounds, **CACHES[cache], remasking_strategy=strategy)
    check_against_reference(tiny[family], settings)


@pytest.mark.parametrize("target", ["confidence", "margin_confidence", "neg_entropy", "random"])
@pytest.mark.parametrize("extra", [{}, {"alg_temp": 0.3}, {"pad_target_penalty": 5.0}], ids=str)
def test_targets(tiny, target, extra):
    settings = Sampling(**BASE, remasking_strategy="low_confidence_static", target=target, **extra)
    check_against_reference(tiny["dream"], settings, stops=(1, 2, 3, 4, 5, 6, 7, 8))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("key", ["confidence_eos_eot_inf", "logits_eos_inf"])
@pytest.mark.parametrize("draw", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9}], ids=str)
def test_ends_that_wait_or_are_not_drawn(tiny, strategy, key, draw):
    """A third of all tokens end the response, the end of sequence among them: whatever is drawn meets the rule."""
    loaded = tiny["llada"]
    stops = tuple(sorted({*range(0, loaded.model.config.vocab_size, 3), loaded.model.config.eos_token_id}))
    settings = Sampling(**BASE, **draw, remasking_strategy=strategy, **{key: True})
    check_against_reference(loaded, settings, stops)


@pytest.fixture
def ending(tiny) -> tuple[LoadedModel, torch.Tensor]:
    """A model with a planted end of sequence, its likeliest token by far everywhere; and that token's id (1,)."""
    loaded = replace(tiny["llada"], model=copy.deepcopy(tiny["llada"].model))
    end = torch.tensor([loaded.model.config.eos_token_id])
    loaded.model.lm_head.register_forward_hook(lambda module, given, logits: logits.index_fill(-1, end, 30.0))
    return loaded, end


def test_a_sure_end_reaches_no_threshold_where_its_confidence_is_infinitely_low(ending):
    """All candidates of the first block are sure ends: unmasked at once, or one by one from the left."""
    loaded, end = ending
    settings = Sampling(**BASE, remasking_strategy="low_confidence_dynamic")
    free = run(loaded, [Request("a", prompt(5))], settings, (int(end),))["a"]
    late = run(loaded, [Request("a", prompt(5))], replace(settings, confidence_eos_eot_inf=True), (int(end),))["a"]
    assert free.step_map[:8] == [0] * 8 and late.step_map[:8] == list(range(8))
    assert late.confidence[:8] == pytest.approx([1] * 8)  # what is recorded is the probability


def test_a_planted_end_of_sequence_is_not_drawn(ending):
    """Where it is the likeliest token everywhere, the response is nothing else, and the second likeliest if barred."""
    loaded, end = ending
    settings = Sampling(**BASE, temperature=0)
    free = run(loaded, [Request("a", prompt(5))], settings)["a"]
    assert free.response_ids == [int(end)] * 16
    barred = run(loaded, [Request("a", prompt(5))], replace(settings, logits_eos_inf=True))["a"]
    assert int(end) not in barred.response_ids and loaded.mask_id not in barred.response_ids
    assert max(barred.logp) < -20 < -1 < free.logp[0]  # by the network, all but impossible
    assert barred.kept_mass < 1e-6 and min(barred.confidence) > 1e-3


def test_a_model_without_an_end_of_sequence_has_none_to_bar(tiny):
    loaded = replace(tiny["llada"], model=copy.deepcopy(tiny["llada"].model))
    loaded.model.config.eos_token_id = None
    settings = Sampling(**BASE, logits_eos_inf=True)
    with pytest.raises(UserError, match=r"rollout\.logits_eos_inf: the model's config\.json names no eos_token_id"):
        run(loaded, [Request("a", prompt(5))], settings)


@pytest.mark.parametrize("draw", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 6, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_draws(tiny, family, draw):
    check_against_reference(tiny[family], Sampling(**BASE, **draw, use_cache=True))


@pytest.mark.parametrize(("steps", "limit"), [(3, 16), (16, 16), (40, 16), (7, 13), (1, 24)])
def test_steps_are_divided_over_the_blocks_and_the_canvas_is_rounded_up(tiny, steps, limit):
    settings = Sampling(**BASE | {"steps": steps, "max_token": limit}, remasking_strategy="low_confidence_static")
    check_against_reference(tiny["llada"], settings)


def test_an_early_stop_leaves_the_rest_masked(tiny):
    loaded, settings = tiny["llada"], Sampling(**BASE | {"max_token": 32})
    free = run(loaded, [Request("a", prompt(5))], settings)["a"]
    stop = free.response_ids[3]
    cut = run(loaded, [Request("a", prompt(5))], settings, (stop,))["a"]
    assert (cut.finish_reason, cut.length) == ("stop", free.response_ids.index(stop) + 1)
    assert cut.response_ids == free.response_ids[:8] + [loaded.mask_id] * 24
    assert cut.step_map[8:] == [-1] * 24 and min(cut.step_map[:8]) >= 0
    assert cut.steps < free.steps


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_5_9_and_17_get_what_they_get_alone(tiny, family, cache):
    settings = Sampling(**BASE, **CACHES[cache])
    requests = [Request(str(n), prompt(n), seed=1) for n in (5, 9, 17)]
    together = run(tiny[family], requests, settings)
    for request in requests:
        alone = run(tiny[family], [request], settings)[request.task_id]
        assert alone.response_ids == together[request.task_id].response_ids
        assert alone.step_map == together[request.task_id].step_map


@pytest.mark.parametrize("family", ["llada", "mmada"])
def test_golden_responses_are_exact(family):
    expected = json.loads((GOLDEN / family / "expected.json").read_text())
    tensors = load_file(GOLDEN / family / "expected.safetensors")
    engine = Engine(load_network(GOLDEN / family, family), expected["mask_id"], ())
    for case in expected["cases"]:
        dynamic = case["threshold"] is not None
        settings = Sampling(
            block_size=case["block_size"],
            steps=case["steps"],
            max_token=case["gen_length"],
            temperature=0.0,
            remasking_strategy="low_confidence_dynamic" if dynamic else "low_confidence_static",
            dynamic_threshold=case["threshold"] or 0.0,
        )
        ids = tensors[case["prompt"]].flatten().tolist()
        (got,) = engine.generate([Request("golden", ids)], settings)
        assert ids + got.response_ids == tensors[case["tokens"]].flatten().tolist()
        assert got.step_map == tensors[case["step_map"]].flatten().tolist()
        assert got.steps == case["nfe"]


@pytest.mark.parametrize("family", [*FAMILIES, "sdar"])
def test_diffusion_generate_with_left_padding(tiny, family, tiny_sdar):
    loaded = tiny[family] if family in tiny else load_model(tiny_sdar, "sdar")
    tokens = loaded.tokenizer(["1+2", "11+12+13"], return_tensors="pt", padding=True, padding_side="left")
    arguments = {"gen_length": 12, "block_length": 4, "steps": 6, "temperature": 0.0, "stop_ids": []}
    both = generate.diffusion_generate(loaded.model, tokens, loaded.mask_id, **arguments)
    assert both.shape == (2, tokens["input_ids"].shape[1] + 12)
    assert torch.equal(both[:, :-12], tokens["input_ids"])
    for row, text in enumerate(["1+2", "11+12+13"]):
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        alone = generate.diffusion_generate(loaded.model, ids, loaded.mask_id, **arguments)
        assert torch.equal(alone[0, -12:], both[row, -12:])


def test_a_canvas_that_is_rounded_up_is_said_once(tiny, capsys):
    settings = Sampling(**BASE | {"max_token": 13})
    engine = Engine(tiny["llada"].model, tiny["llada"].mask_id, ())
    for _ in range(2):
        (got,) = engine.generate([Request("a", prompt(4))], settings)
    assert isinstance(got, Trajectory) and got.length == 13 and len(got.response_ids) == 16
    assert capsys.readouterr().out.count("max_token 13 is no multiple of block_size 8") == 1


def test_an_empty_prompt_is_refused(tiny):
    with pytest.raises(UserError, match="the prompt is empty"):
        run(tiny["dream"], [Request("a", [])], Sampling(**BASE))
