"""generate.py as users call it: one function beside transformers' own loaders, and the command."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import generate
from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from generate import block_diffusion_generate, diffusion_generate
from models import load_model, load_tokenizer
from models.family import stop_ids_of_network
from models.prompts import stop_ids_of
from rollout.lm_harness import make_harness_model
from sample import show
from sample.engine import Engine
from tests.browser import read_data

ROOT = Path(__file__).parent.parent
QUESTIONS = ["4+2+8+1", "3*(7-2)", "9"]


@pytest.fixture(scope="module")
def model(tiny_sdar: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(tiny_sdar), trust_remote_code=True, device_map="cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_sdar: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(tiny_sdar), trust_remote_code=True)


def encoded(tokenizer: PreTrainedTokenizerBase, *questions: str) -> Mapping[str, torch.Tensor]:
    messages = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        messages, return_dict=True, return_tensors="pt", padding=True, add_generation_prompt=True
    )


def responses(output: torch.Tensor, tokens: Mapping[str, torch.Tensor]) -> list[list[int]]:
    width = tokens["input_ids"].shape[1]
    assert torch.equal(output[:, :width], tokens["input_ids"])
    return output[:, width:].tolist()


def test_the_call_of_the_readme(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "4+2+8+1"}]
    tokens = tokenizer.apply_chat_template(
        messages, return_dict=True, return_tensors="pt", padding=True, add_generation_prompt=True
    )
    output = block_diffusion_generate(
        model,
        prompt=tokens,
        mask_id=tokenizer.mask_token_id,
        gen_length=20,
        block_length=4,
        denoising_steps=4,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        remasking_strategy="low_confidence_dynamic",
        confidence_threshold=0.9,
    )
    assert output.dtype == torch.long and output.dim() == 2
    (response,) = responses(output, tokens)
    assert 1 <= len(response) <= 20
    assert tokenizer.mask_token_id not in response
    assert len(response) == 20 or response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(output[0]).startswith("<|im_start|>4+2+8+1<|assistant|>")


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"denoising_steps": 3}, {"denoising_steps_per_block": 3}),
        ({"block_length": 4, "denoising_steps": 2}, {"block_size": 4, "denoising_steps_per_block": 2}),
        ({"block_length": 4}, {"block_size": 4, "denoising_steps_per_block": 4}),  # no more steps than tokens
        ({"temperature": 0.0}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_k": 6, "top_p": 0.8}, {"temperature": 0.7, "top_k": 6, "top_p": 0.8}),
        ({"remasking_strategy": "sequential"}, {"remasking_strategy": "sequential"}),
        ({"confidence_threshold": 0.05}, {"dynamic_threshold": 0.05}),
        ({"gen_length": 7}, {"max_token": 7}),
    ],
)
def test_arguments_are_the_samplers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ours: dict, theirs: dict
) -> None:
    tokens = encoded(tokenizer, "4+2+8+1")
    request = Request("0", tokens["input_ids"][0].tolist(), seed=3)
    original = {"block_size": 8, "denoising_steps_per_block": 8, "dynamic_threshold": 0.85}
    settings = Sampling(**{"max_token": 12} | original | theirs)
    (expected,) = Engine(model, tokenizer.mask_token_id, [tokenizer.eos_token_id]).generate([request], settings)
    arguments = {"gen_length": 12, "seed": 3} | ours
    output = block_diffusion_generate(model, tokens, tokenizer.mask_token_id, **arguments)
    assert responses(output, tokens) == [expected.response_ids[: expected.length]]


@pytest.mark.parametrize("given", ["tensor", "row", "dict"])
def test_a_prompt_in_other_forms(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: str) -> None:
    tokens = encoded(tokenizer, "4+2+8+1")
    ids = tokens["input_ids"]
    prompt = {"tensor": ids, "row": ids[0], "dict": {"input_ids": ids}}[given]
    settings = {"mask_id": tokenizer.mask_token_id, "gen_length": 6, "seed": 1}
    assert torch.equal(
        block_diffusion_generate(model, prompt, **settings), block_diffusion_generate(model, tokens, **settings)
    )


def test_left_padding_changes_no_response(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = encoded(tokenizer, *QUESTIONS)
    assert (tokens["attention_mask"].sum(1) < tokens["input_ids"].shape[1]).any()
    settings = {"mask_id": tokenizer.mask_token_id, "gen_length": 11, "seed": 5}
    greedy = responses(block_diffusion_generate(model, tokens, temperature=0.0, **settings), tokens)
    drawn = responses(block_diffusion_generate(model, tokens, temperature=1.0, **settings), tokens)
    for row, question in enumerate(QUESTIONS):
        alone = encoded(tokenizer, question)
        assert alone["attention_mask"].all()
        (expected,) = responses(block_diffusion_generate(model, alone, temperature=0.0, **settings), alone)
        assert greedy[row][: len(expected)] == expected
        if row == 0:  # the row's number enters the random numbers, so that equal prompts get different responses
            (expected,) = responses(block_diffusion_generate(model, alone, temperature=1.0, **settings), alone)
            assert drawn[row][: len(expected)] == expected


def test_equal_prompts_get_different_responses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = encoded(tokenizer, "4+2", "4+2")
    output = block_diffusion_generate(model, tokens, tokenizer.mask_token_id, gen_length=12, seed=1)
    one, other = responses(output, tokens)
    assert one != other


def test_responses_are_padded_on_the_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = encoded(tokenizer, *QUESTIONS)
    settings = {"mask_id": tokenizer.mask_token_id, "gen_length": 16, "seed": 5}
    free = responses(block_diffusion_generate(model, tokens, stop_ids=[], **settings), tokens)
    assert [len(response) for response in free] == [16] * 3
    stop = next(t for t in range(33) if len({response.index(t) if t in response else 16 for response in free}) == 3)
    ends = [response.index(stop) + 1 if stop in response else 16 for response in free]
    got = responses(block_diffusion_generate(model, tokens, stop_ids=[stop], **settings), tokens)
    for response, whole, end in zip(got, free, ends):
        assert len(response) == max(ends)
        assert response[:end] == whole[:end]
        assert set(response[end:]) <= {tokenizer.pad_token_id}
    assert min(ends) < max(ends)


def eos_of_config(folder: Path, ids: list[int]) -> None:
    edit_json(folder / "config.json", eos_token_id=ids[0])


def eos_of_generation(folder: Path, ids: list[int]) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=ids)


def eos_of_tokenizer(folder: Path, ids: list[int]) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=load_tokenizer(folder).convert_ids_to_tokens(ids[0]))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("place", [eos_of_config, eos_of_generation, eos_of_tokenizer])
def test_the_functions_know_the_stops_of_the_engine(
    place: Callable[[Path, list[int]], None], tiny_sdar: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """An end of sequence counts wherever the checkpoint names it; further ones add to it."""
    tokens = encoded(tokenizer, "4+2+8+1")
    settings = {"mask_id": tokenizer.mask_token_id, "gen_length": 24, "seed": 2}
    folder = Path(shutil.copytree(tiny_sdar, tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    (free,) = responses(block_diffusion_generate(model, tokens, stop_ids=[], **settings), tokens)
    assert load_model(folder, "sdar").stop_ids == (34,) == stop_ids_of_network(model)
    own = [free[9], free[12]]
    folder = Path(shutil.copytree(tiny_sdar, tmp_path / "other stops"))
    place(folder, own)
    changed, loaded = AutoModelForCausalLM.from_pretrained(str(folder)), load_model(folder, "sdar")
    assert loaded.stop_ids == stop_ids_of_network(changed) and set(loaded.stop_ids) & set(own)

    def end(stops: Iterable[int]) -> list[int]:
        return free[: min((free.index(stop) + 1 for stop in stops if stop in free), default=len(free))]

    def got(**given: object) -> list[int]:
        return responses(block_diffusion_generate(changed, tokens, **settings, **given), tokens)[0]

    assert got() == end(loaded.stop_ids) != free
    for more in ([free[3]], [free[20]], [free[1], 1000]):
        assert got(stopping_criteria_idx=more) == end([*loaded.stop_ids, *more])
        assert got(stopping_criteria_idx=more, stop_ids=[]) == end(more)


@pytest.mark.parametrize("tokens, ids", [(None, (34,)), ([], (34,)), (["7"], (7, 34)), (["<|im_end|>", "5"], (5, 34))])
def test_a_stop_token_list_adds_to_the_models_own(
    tokens: list[str] | None, ids: tuple[int, ...], tiny_sdar: Path
) -> None:
    assert stop_ids_of(load_model(tiny_sdar, "sdar"), tokens) == ids


def test_the_harness_knows_the_stop_token_list(tiny_sdar: Path) -> None:
    def answer(**given: object) -> str:
        return make_harness_model(str(tiny_sdar), max_token=40, seed=1, **given).generate([("4+2", {})])[0]

    free = answer()
    assert answer(stop_token_list=f"[{free[5]!r}]") == free[: free.index(free[5]) + 1] != free


def test_a_network_made_in_python_has_the_stops_of_its_configs(model: PreTrainedModel) -> None:
    network = type(model)(copy.deepcopy(model.config))
    network.config.name_or_path = ""
    network.generation_config.eos_token_id = [7, 8]
    assert stop_ids_of_network(network) == (7, 8, 34)


def test_the_originals_call_by_place(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """All of its arguments in its order; the last one is `stopping_criteria_idx`."""
    tokens, mask_id = encoded(tokenizer, "4+2+8+1"), tokenizer.mask_token_id
    torch.manual_seed(0)
    by_place = block_diffusion_generate(
        model, tokens, mask_id, 12, 8, 8, 1.0, 0, 1.0, "low_confidence_dynamic", 0.85, [3]
    )
    torch.manual_seed(0)
    assert torch.equal(
        by_place, block_diffusion_generate(model, tokens, mask_id, gen_length=12, stopping_criteria_idx=[3])
    )


def test_seeds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = encoded(tokenizer, "4+2+8+1")

    def call(seed: int | None = None) -> list[int]:
        return block_diffusion_generate(model, tokens, tokenizer.mask_token_id, gen_length=12, seed=seed)[0].tolist()

    assert call(1) == call(1) != call(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = call(), call()
        torch.manual_seed(0)
        assert call() == first != second


def test_mistakes_are_told(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens, mask_id = encoded(tokenizer, "4"), tokenizer.mask_token_id
    with pytest.raises(UserError, match="low_confidence_dynamic"):
        block_diffusion_generate(model, tokens, mask_id, remasking_strategy="low_confidence")
    for function, last in ((block_diffusion_generate, "denoising_steps"), (diffusion_generate, "steps")):
        for name in ("gen_length", "block_length", last):
            with pytest.raises(UserError, match=f"^{name}=0: give at least 1"):
                function(model, tokens, mask_id, **{name: 0})
        with pytest.raises(UserError, match=r"^prompt: has <\|unk\|>, of characters without a token; .* reads 0123"):
            function(model, encoded(tokenizer, "four"), mask_id)


# ---- the command


def test_the_command(tiny_sdar: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    arguments = [f"model={tiny_sdar}", "prompt=4+2+8+1", "max_token=9", "seed=7"]
    result = subprocess.run(
        [sys.executable, "generate.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    request = Request("prompt", encoded(tokenizer, "4+2+8+1")["input_ids"][0].tolist(), seed=7)
    engine = Engine(model, tokenizer.mask_token_id, [tokenizer.eos_token_id])
    (expected,) = engine.generate([request], Sampling(max_token=9))
    text = tokenizer.decode(expected.response_ids[: expected.length], skip_special_tokens=True)
    assert f"\n{text}\n{expected.length} tokens in {expected.steps} denoising steps" in result.stdout
    assert "Traceback" not in result.stderr


def test_the_command_tells_a_mistake_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, word in (
        (["model=/nope", "prompt=4"], "/nope"),
        (["prompt=4"], "model"),
        (["model=/nope", "prompt=4", "remasking_strategy=low"], "remasking_strategy"),
    ):
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            generate.main()
        output = capsys.readouterr()
        assert caught.value.code == 2
        assert output.out == ""
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        assert word in output.err


# ---- the chat


def test_a_chat(
    tiny_sdar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Turns build on each other until /new; the page of the last answer is written on request; the input ends it."""
    page = tmp_path / "last.html"
    lines = ["/trace", "1+2", "one", "3+4", "/new", "3+4", f"/trace {page}", "/wrong [x]", ""]
    prompts = []
    drawn = Engine.generate

    def generate_seen(self: Engine, requests: list[Request], *rest: object) -> Iterator[Trajectory]:
        prompts.append(requests[0].prompt_ids)
        return drawn(self, requests, *rest)

    def typed(*_: object, **__: object) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr(Engine, "generate", generate_seen)
    monkeypatch.setattr(show.console, "input", typed)
    monkeypatch.setattr(sys, "argv", ["generate.py", f"model={tiny_sdar}", "max_token=8"])
    generate.main()
    first, second, fresh = prompts
    assert second[: len(first)] == first and len(second) > len(fresh) and second[-len(fresh) + 1 :] == fresh[1:]
    output = capsys.readouterr().out
    assert "no token for 'o', 'n', 'e'; it reads 0123456789+-*/=;}{()[]<>,.?:^% and \\boxed{" in output
    assert "begin anew" not in output
    assert "there is no answer yet" in output and "/wrong is no command" in output
    assert len(read_data(page.read_text(encoding="utf-8"))["responses"]) == 1
