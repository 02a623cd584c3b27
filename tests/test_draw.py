"""The draw: random numbers that depend on names alone, the filters' order, and what confidence and logp are."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.schema import Sampling
from common.trajectory import Request
from models import load_model
from sample.draw import (
    Candidates,
    crossing,
    draw,
    filter_top,
    inverse_cdf,
    search_crossing,
    token_logp,
    uniforms,
)
from sample.engine import Engine
from tests import reference

MASK = 3
LAST_UNIFORM = 1 - 2.0**-24


def keys(*requests: Request) -> torch.Tensor:
    return torch.tensor([request.stream_key() for request in requests])


def numbers(request: Request, position: int = 0, step: int = 0, stream: str = "token", count: int = 1) -> np.ndarray:
    """`count` random numbers of positions position, position + 1, …"""
    positions = torch.arange(position, position + count)[None]
    return uniforms(keys(request), positions, torch.tensor([step]), stream)[0].numpy()


def logits_of(*probability: float) -> torch.Tensor:
    """Logits (1, 1, vocab) of given probabilities; the mask token's place must be taken into account."""
    return torch.tensor(probability).log()[None, None]


def drawn(logits: torch.Tensor, u: float | torch.Tensor = 0.5, **sampling: object) -> Candidates:
    uniform = torch.as_tensor(u, dtype=torch.float32).expand(logits.shape[:2])
    return draw(logits, uniform, MASK, Sampling(remasking_strategy="entropy_bounded", **sampling))


# ---- random numbers


def test_the_finaliser_is_splitmix64s() -> None:
    assert reference.mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published generator's first number, seed 0


@pytest.mark.parametrize("stream, number", [("token", 1), ("alg_temp", 2), ("random", 3)])
def test_the_hash_is_the_one_written_down(stream: str, number: int) -> None:
    for request, position, step in ((Request("a", []), 0, 0), (Request("b", [], 3, 10086, 7), 4095, 511)):
        expected = reference.uniform(request.stream_key(), position, step, number)
        assert numbers(request, position, step, stream) == expected


def test_numbers_are_uniform_in_the_half_open_unit_interval() -> None:
    u = numbers(Request("a", []), count=1 << 16)
    assert u.dtype == np.float32
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    chi_square = ((counts - 1024) ** 2 / 1024).sum()
    assert 30 < chi_square < 110  # 63 degrees of freedom: 63 ± 11


NEIGHBOURS = {
    "seed": (Request("a", [], seed=1), 0, "token"),
    "rl step": (Request("a", [], step=1), 0, "token"),
    "task": (Request("b", []), 0, "token"),
    "sample": (Request("a", [], sample=1), 0, "token"),
    "denoising step": (Request("a", []), 1, "token"),
    "stream alg_temp": (Request("a", []), 0, "alg_temp"),
    "stream random": (Request("a", []), 0, "random"),
}


def test_every_name_gives_numbers_unlike_the_others() -> None:
    n = 1 << 14
    series = {name: numbers(request, 0, step, stream, n) for name, (request, step, stream) in NEIGHBOURS.items()}
    series |= {"itself": numbers(Request("a", []), count=n), "position": numbers(Request("a", []), 1, count=n)}
    for one, other in combinations(series, 2):
        assert np.mean(series[one] == series[other]) < 0.001, (one, other)
        assert abs(np.corrcoef(series[one], series[other])[0, 1]) < 5 / math.sqrt(n), (one, other)


def test_names_that_read_alike_when_joined_are_kept_apart() -> None:
    assert Request("a", [], sample=11, step=1).stream_key() != Request("a", [], sample=1, step=11).stream_key()
    assert Request("1", [], sample=11).stream_key() != Request("11", [], sample=1).stream_key()


def test_numbers_depend_neither_on_the_batch_nor_on_the_prompt() -> None:
    requests = [Request(f"task {n}", [n], sample=n) for n in range(5)]
    positions, step = torch.arange(20).reshape(5, 4), torch.arange(5)
    together = uniforms(keys(*requests), positions, step, "token")
    for row in range(5):
        alone = uniforms(keys(requests[row]), positions[row : row + 1], step[row : row + 1], "token")
        assert torch.equal(together[row : row + 1], alone)
    turned = uniforms(keys(*requests[::-1]), positions.flip(0), step.flip(0), "token")
    assert torch.equal(turned.flip(0), together)
    assert Request("a", [1]).stream_key() == Request("a", [2, 3]).stream_key()


# ---- the token


@settings(deadline=None, database=None, derandomize=True, max_examples=150)
@given(
    st.lists(st.floats(-6, 6, width=16), min_size=5, max_size=12),
    st.floats(0, LAST_UNIFORM, width=32),
    st.sampled_from([0.0, 0.5, 0.7, 1.0, 1.5]),
    st.integers(0, 13),
    st.sampled_from([0.05, 0.3, 0.6, 0.95, 1.0]),
    st.sampled_from(["raw", "sampled"]),
    st.sampled_from(["raw", "sampled"]),
    st.sampled_from(["top_k_first", "top_p_first"]),
)
def test_a_draw_is_the_plain_one(
    values: list[float],
    u: float,
    temperature: float,
    top_k: int,
    top_p: float,
    confidence_from: str,
    entropy_from: str,
    order: str,
) -> None:
    sampling = Sampling(
        remasking_strategy="entropy_bounded",
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        confidence_from=confidence_from,
        entropy_from=entropy_from,
        filter_order=order,
    )
    logits = torch.tensor(values)
    # a sum that lands within rounding of a border may be told either way
    logp = token_logp(logits, MASK, temperature or 1)
    weight = filter_top(logp.exp(), top_k if order == "top_k_first" else 0, 1.0)
    ranked = (weight / weight.sum()).sort(descending=True, stable=True).values.cumsum(0)
    assume(top_p == 1 or (ranked - top_p).abs().min() > 1e-5)
    kept = filter_top(logp.exp(), top_k, top_p, order)
    assume((kept.cumsum(0) / kept.sum() - u).abs().min() > 1e-5)

    expected = reference.draw_one(logits.numpy(), u, MASK, sampling)
    got = draw(logits[None, None], torch.tensor([[u]]), MASK, sampling)
    assert int(got.tokens) == expected.token
    assert float(got.probability) == pytest.approx(expected.confidence, abs=1e-5)
    assert float(got.logp) == pytest.approx(expected.logp, abs=1e-5)
    assert float(got.entropy) == pytest.approx(expected.entropy, abs=1e-5)
    assert float(got.kept_mass) == pytest.approx(expected.kept_mass, abs=1e-5)


def test_even_random_numbers_give_every_token_its_share_in_id_order() -> None:
    probability = [0.1, 0.25, 0.05, 0.2, 0.3, 0.1]  # MASK's 0.2 is shared out among the others
    n = 4000
    u = (torch.arange(n) + 0.5)[None] / n
    tokens = drawn(logits_of(*probability).expand(1, n, 6), u).tokens[0]
    assert torch.equal(tokens, tokens.sort().values)
    share = torch.bincount(tokens, minlength=6) / n
    expected = torch.tensor([0.1, 0.25, 0.05, 0, 0.3, 0.1]) / 0.8
    torch.testing.assert_close(share, expected, rtol=0, atol=1.5 / n)


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.0, "top_k": 5, "top_p": 0.1}])
def test_greedy_is_the_argmax_whatever_the_random_number(greedy: dict) -> None:
    u = torch.tensor([[0.0, 0.5, LAST_UNIFORM]])
    tied = logits_of(0.1, 0.3, 0.3, 0.2, 0.1).expand(1, 3, 5)
    assert drawn(tied, u, **greedy).tokens.tolist() == [[1, 1, 1]]


def test_the_mask_token_is_never_drawn() -> None:
    logits = torch.zeros(1, 1000, 6)
    logits[..., MASK] = 30
    u = torch.linspace(0, LAST_UNIFORM, 1000)[None]
    for sampling in ({}, {"temperature": 0.0}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"temperature": 0.3}):
        assert not (drawn(logits, u, **sampling).tokens == MASK).any(), sampling


def test_extreme_random_numbers_stay_with_tokens_that_were_kept() -> None:
    weight = torch.tensor([[0.0, 0.2, 0.0, 0.3, 0.0]])
    assert inverse_cdf(weight, torch.tensor([0.0])).item() == 1
    assert inverse_cdf(weight, torch.tensor([LAST_UNIFORM])).item() == 3
    assert inverse_cdf(weight, torch.tensor([1.0])).item() == 3  # what rounding may make of u × total


def test_a_running_sum_that_rounds_upwards_at_a_dropped_token_does_not_draw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # a parallel sum, as on a GPU, may differ in the last bit between a token and a weightless one behind it
    sums = torch.tensor([[0.25, 0.25 + 2.0**-25, 1.0, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: sums)
    weight = torch.tensor([[0.25, 0.0, 0.75, 0.0]])
    assert inverse_cdf(weight, torch.tensor([0.25])).item() == 2


def peaked(rows: int, vocabulary: int, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))


@pytest.mark.parametrize("vocabulary", [129, 256, 1000, 32_000])
def test_a_large_vocabulary_is_drawn_from_in_id_order(vocabulary: int) -> None:
    """The plain definition in float64; where u lands within rounding of a border it may be told either way."""
    logits = peaked(64, vocabulary)
    u = torch.rand(64, generator=torch.Generator().manual_seed(1))
    got = draw(logits[None], u[None], MASK, Sampling())
    weight = logits.double().index_fill(-1, torch.tensor([MASK]), float("-inf")).softmax(-1)
    running = weight.cumsum(-1)
    expected = (running > u.double()[:, None]).int().argmax(-1)
    clear = (running - u.double()[:, None]).abs().amin(-1) > 1e-6
    assert clear.sum() > 48
    assert torch.equal(got.tokens[0][clear], expected[clear])
    at_token = weight.log().gather(-1, got.tokens[0][:, None])[:, 0]
    torch.testing.assert_close(got.logp[0].double(), at_token, rtol=0, atol=2e-6)


def test_a_group_without_weight_is_never_drawn_from() -> None:
    weight = torch.zeros(3, 512)
    weight[:, 130], weight[:, 300] = 1.0, 3.0
    assert inverse_cdf(weight, torch.tensor([0.0, 0.5, 1.0])).tolist() == [130, 300, 300]
    assert inverse_cdf(weight[:, :500], torch.tensor([0.0, 0.2, LAST_UNIFORM])).tolist() == [130, 130, 300]


def test_weights_do_not_vanish_where_the_mask_token_is_far_ahead() -> None:
    logits = logits_of(0.1, 0.2, 0.3, 0.1, 0.3)
    logits[..., MASK] = 1000.0
    got = drawn(logits, 0.5)
    assert got.tokens.item() == 2 and got.logp.item() == pytest.approx(math.log(0.3 / 0.9), abs=1e-6)
    assert got.probability.item() == 0.0


@pytest.mark.parametrize("mask_id", [0, 1, 4])
def test_the_mask_token_may_have_any_id(mask_id: int) -> None:
    probability = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    got = draw(probability.log()[None, None], torch.tensor([[0.6]]), mask_id, Sampling())
    left = probability.index_fill(0, torch.tensor([mask_id]), 0.0)
    assert got.tokens.item() == int((left.cumsum(0) > 0.6 * left.sum()).int().argmax())
    assert got.logp.item() == pytest.approx(float((left[got.tokens] / left.sum()).log()), abs=1e-6)
    assert got.probability.item() == pytest.approx(float(probability[got.tokens]), abs=1e-6)


def test_the_logits_are_left_as_they_were() -> None:
    logits = peaked(2, 300)
    before = logits.clone()
    for sampling in ({}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.9}, {"target": "margin_confidence"}):
        drawn(logits[None], 0.5, **sampling)
        assert torch.equal(logits, before)


def test_chunks_make_no_difference(tiny_sdar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(tiny_sdar, "sdar")
    requests = [Request(str(n), [n, 5, 7], n) for n in range(5)]
    settings = Sampling(max_token=12, temperature=0.9)

    def responses() -> list[tuple[list[int], list[float]]]:
        engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
        return [(one.response_ids, one.logp) for one in engine.generate(requests, settings)]

    expected = responses()
    monkeypatch.setattr("sample.step.DRAW_ELEMENTS", 7 * loaded.model.config.vocab_size)
    for (ids, logp), (other_ids, other_logp) in zip(responses(), expected, strict=True):
        assert ids == other_ids and logp == pytest.approx(other_logp, abs=1e-5)


# ---- the filters


def kept_ids(probability: list[float], top_k: int = 0, top_p: float = 1.0) -> list[int]:
    kept = filter_top(torch.tensor(probability), top_k, top_p)
    ids = kept.nonzero()[:, 0].tolist()
    assert all(kept[i] == torch.tensor(probability)[i] for i in ids)  # sums are not restored
    return ids


def test_top_k_keeps_the_k_likeliest_and_the_lower_of_equals() -> None:
    assert kept_ids([0.1, 0.4, 0.3, 0.2], top_k=2) == [1, 2]
    assert kept_ids([0.2, 0.2, 0.2, 0.4], top_k=2) == [0, 3]
    assert kept_ids([0.1, 0.4, 0.3, 0.2], top_k=0) == kept_ids([0.1, 0.4, 0.3, 0.2], top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    probability = [0.125, 0.5, 0.25, 0.125]
    assert kept_ids(probability, top_p=0.4) == [1]
    assert kept_ids(probability, top_p=0.5) == [1]  # reached, so nothing more
    assert kept_ids(probability, top_p=0.51) == [1, 2]
    assert kept_ids(probability, top_p=0.8) == [0, 1, 2]
    assert kept_ids(probability, top_p=1.0) == [0, 1, 2, 3]
    assert kept_ids(probability, top_p=0.0) == [1]


def test_top_p_counts_what_top_k_left_as_the_whole() -> None:
    probability = [0.1, 0.4, 0.3, 0.2]  # of the two likeliest: 4/7 and 3/7
    assert kept_ids(probability, top_k=2, top_p=0.5) == [1]
    assert kept_ids(probability, top_p=0.5) == [1, 2]


def test_equal_weights_are_kept_from_the_lowest_id_on() -> None:
    weight = torch.full((2, 3000), 0.25)
    weight[0, 2000] = weight[1, 7] = 1.0
    assert filter_top(weight, 3, 1.0)[0].nonzero()[:, 0].tolist() == [0, 1, 2000]
    # 1 + 0.25 · 2999 in all: a hundredth is reached with 27 of the equal ones, those after are dropped
    kept = filter_top(weight, 0, 0.01)
    assert kept[1].nonzero()[:, 0].tolist() == list(range(28)) and kept[1, 7] == 1
    assert kept[0].nonzero()[:, 0].tolist() == [*range(27), 2000]


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_search_finds_where_the_sorted_sum_crosses(top_p: float, scale: float) -> None:
    weight = peaked(16, 2000, scale).softmax(-1).bfloat16().float()  # rounded: many are equal
    weight[:, ::3] = 0
    least, count = search_crossing(weight, top_p)
    # each row's sum is far enough from the border for float32 and float64 to agree
    expected_least, expected_count = crossing(weight.double().sort(dim=-1, descending=True).values, top_p)
    assert torch.equal(least.double(), expected_least)
    assert torch.equal(count.long(), expected_count)


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 40}, {"top_k": 40, "top_p": 0.7}])
def test_filtered_draws_follow_the_filtered_distribution(sampling: dict) -> None:
    probability = peaked(1, 2000, 3.0).softmax(-1)[0]
    u = (torch.arange(4000) + 0.5) / 4000
    tokens = draw(probability.log().expand(1, 4000, 2000), u[None], MASK, Sampling(**sampling)).tokens[0]
    ranked, order = probability.double().index_fill(0, torch.tensor([MASK]), 0.0).sort(descending=True, stable=True)
    ranked = ranked[: sampling.get("top_k", 2000)]
    before = (ranked.cumsum(0) - ranked) / ranked.sum()
    ranked = ranked * (before < sampling.get("top_p", 1.0))
    expected = torch.zeros(2000, dtype=torch.float64).scatter(0, order[: len(ranked)], ranked / ranked.sum())
    share = torch.bincount(tokens, minlength=2000).double() / 4000
    torch.testing.assert_close(share, expected, rtol=0, atol=1.5 / 4000)


def test_temperature_comes_before_the_filters() -> None:
    logits = logits_of(0.4, 0.3, 0.3, 0.0)
    assert drawn(logits, LAST_UNIFORM, top_p=0.4).tokens.item() == 0
    assert drawn(logits, LAST_UNIFORM, top_p=0.4, temperature=2.0).tokens.item() == 1


# ---- what is recorded


def test_raw_confidence_knows_no_temperature_filter_or_forbidden_token() -> None:
    logits = logits_of(0.3, 0.2, 0.1, 0.4)
    for sampling in ({}, {"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.3, "top_k": 2, "top_p": 0.5}):
        assert drawn(logits, 0.0, **sampling).probability.item() == pytest.approx(0.3, abs=1e-6), sampling


def test_sampled_confidence_is_that_of_the_filtered_softmax() -> None:
    logits = logits_of(0.3, 0.2, 0.1, 0.4)
    assert drawn(logits, 0.0, confidence_from="sampled").probability.item() == pytest.approx(0.5, abs=1e-6)
    assert drawn(logits, 0.0, confidence_from="sampled", top_k=2).probability.item() == pytest.approx(0.6, abs=1e-6)
    assert drawn(logits, 0.0, confidence_from="sampled", top_k=1).probability.item() == 1


def test_entropy_is_of_the_raw_or_the_filtered_softmax() -> None:
    logits, even = logits_of(0.3, 0.3, 0.05, 0.35), torch.tensor(2.0).log().item()  # 0.35: the mask token's
    raw = -sum(p * math.log(p) for p in (0.3, 0.3, 0.05, 0.35))
    assert drawn(logits, 0.0, top_k=2).entropy.item() == pytest.approx(raw, abs=1e-6)
    assert drawn(logits, 0.0, top_k=2, entropy_from="sampled").entropy.item() == pytest.approx(even, abs=1e-6)
    assert drawn(logits, 0.0, top_k=1, entropy_from="sampled").entropy.item() == pytest.approx(0, abs=1e-6)
    by_confidence = Sampling(remasking_strategy="sequential", entropy_from="sampled", top_k=2)
    assert draw(logits, torch.zeros(1, 1), MASK, by_confidence).entropy.item() == 0, "nothing reads it"


def test_the_filter_that_cuts_first_says_what_the_other_is_a_share_of() -> None:
    """Of 0.4, 0.3, 0.2, 0.1 three are 0.9: 0.7 / 0.9 reaches 0.75, of the whole the third is needed."""
    probability = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert filter_top(probability, 3, 0.75).tolist() == pytest.approx([0.4, 0.3, 0, 0])
    assert filter_top(probability, 3, 0.75, "top_p_first").tolist() == pytest.approx([0.4, 0.3, 0.2, 0])
    assert filter_top(probability, 2, 0.75, "top_p_first").tolist() == pytest.approx([0.4, 0.3, 0, 0])


def test_logp_is_before_the_filters_and_of_the_temperature() -> None:
    logits = logits_of(0.3, 0.2, 0.1, 0.4)
    for sampling in ({}, {"top_k": 2}, {"top_p": 0.1}, {"temperature": 0.0}, {"temperature": 0.2, "top_k": 1}):
        assert drawn(logits, 0.0, **sampling).logp.item() == pytest.approx(math.log(0.5), abs=1e-6), sampling
    squared = math.log(0.09 / (0.09 + 0.04 + 0.01))
    assert drawn(logits, 0.0, temperature=0.5).logp.item() == pytest.approx(squared, abs=1e-6)


def test_entropy_is_of_the_raw_softmax_in_nats() -> None:
    got = drawn(torch.zeros(1, 1, 8), 0.0, temperature=0.1, top_k=2).entropy.item()
    assert got == pytest.approx(math.log(8), abs=1e-6)


def test_kept_mass_is_what_the_filters_left() -> None:
    logits = logits_of(0.3, 0.2, 0.1, 0.4)
    assert drawn(logits).kept_mass.item() == pytest.approx(1, abs=1e-6)
    assert drawn(logits, top_k=2).kept_mass.item() == pytest.approx(5 / 6, abs=1e-6)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.6}], ids=str)
def test_what_is_barred_is_never_drawn_and_keeps_its_share_of_logp(sampling: dict) -> None:
    """A planted end of sequence of 60 % at id 1; ids 0 and 2 have 25 and 10 %, the mask token 5 %."""
    logits, barred = logits_of(0.25, 0.6, 0.1, 0.05), torch.tensor([1])
    for u in (0.0, 0.3, 0.72, LAST_UNIFORM):
        uniform = torch.full((1, 1), u)
        settings = Sampling(remasking_strategy="entropy_bounded", target="margin_confidence", **sampling)
        got = draw(logits, uniform, MASK, settings, barred)
        alone = sampling.get("temperature") == 0.0 or "top_p" in sampling  # 0.25 of 0.35 crosses 0.6
        token = 0 if alone or u < 25 / 35 else 2
        share = {0: 0.25, 2: 0.1}[token]
        assert got.tokens.item() == token
        assert got.probability.item() == pytest.approx(share / 0.4, abs=1e-6)  # the softmax without it
        assert got.margin.item() == pytest.approx(0.15 / 0.4, abs=1e-6)
        assert got.logp.item() == pytest.approx(
            math.log(share / 0.95), abs=1e-6
        )  # the network's, without the mask alone
        left = 0.25 if "top_p" in sampling else 0.35
        assert got.kept_mass.item() == pytest.approx(left / 0.95, abs=1e-6)
        parts = [0.25 / 0.4, 0.1 / 0.4, 0.05 / 0.4]
        assert got.entropy.item() == pytest.approx(-sum(part * math.log(part) for part in parts), abs=1e-6)


def test_logits_of_low_precision_are_read_in_float32() -> None:
    logits = (torch.randn(1, 2, 50, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    low, full = drawn(logits, 0.3), drawn(logits.float(), 0.3)
    assert torch.equal(low.tokens, full.tokens)
    for name in ("probability", "logp", "entropy", "kept_mass"):
        assert getattr(low, name).dtype == torch.float32
        assert torch.equal(getattr(low, name), getattr(full, name))
