"""The bound on a response's log-likelihood, and the harness's adapter on top of it."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request
from models import LoadedModel, load_model
from models.tiny import build_tiny
from rollout import lm_harness
from rollout.likelihood import response_elbo, spans_of
from rollout.lm_harness import cut, generation_settings, make_harness_model, register_with_harness
from sample.draw import token_logp
from sample.engine import Engine

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=["sdar", "dream", "llada"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    build_tiny(request.param, folder, seed=2)
    return load_model(folder, request.param)


def test_spans() -> None:
    assert spans_of(6, 7, 4) == [(6, 8), (8, 12), (12, 13)]
    assert spans_of(8, 4, 4) == [(8, 12)] and spans_of(8, 3, 4) == [(8, 11)]
    assert spans_of(6, 7, None) == [(6, 13)]


def bound(loaded: LoadedModel, prompt: list[int], response: list[int], block: int | None) -> float:
    """The mean over every mask pattern of every part, weighted as the draw weighs them."""
    whole, total = prompt + response, 0.0
    for start, end in spans_of(len(prompt), len(response), block):
        size = end - start
        for pattern in itertools.product((False, True), repeat=size):
            masked = [start + i for i, hidden in enumerate(pattern) if hidden]
            if not masked:
                continue
            ids = [loaded.mask_id if i in masked else token for i, token in enumerate(whole[:end])]
            order = torch.arange(len(ids)) // (block or len(ids))
            mask = (order[None] <= order[:, None])[None, None]
            logits = loaded.model(torch.tensor([ids]), attention_mask=mask).logits[0]
            logp = token_logp(logits, loaded.mask_id, 1.0)
            told = sum(float(logp[i + loaded.family.logit_offset, whole[i]]) for i in masked)
            total += told * size / len(masked) / (size * math.comb(size, len(masked)))
    return total


@torch.inference_mode()
def test_the_estimate_is_of_the_bound(loaded: LoadedModel) -> None:
    """Against the enumeration of all masks; a single token's likelihood is exact."""
    block = 2 if loaded.family.attention == "block" else None
    prompt, response = [5, 6, 7, 8], [9, 10, 11]
    single = response_elbo(loaded, prompt, [9], block, masks=1)
    assert single == pytest.approx(bound(loaded, prompt, [9], block), abs=1e-5)
    exact = bound(loaded, prompt, response, block)
    found = response_elbo(loaded, prompt, response, block, masks=600, seed=1, rows=100)
    assert found == pytest.approx(exact, rel=0.02)
    assert found == pytest.approx(response_elbo(loaded, prompt, response, block, masks=600, seed=1, rows=64), rel=1e-4)


def test_cut_and_settings() -> None:
    assert cut("a\n\nQ: b", ["Q:", "\n\n"]) == "a" and cut("abc", []) == "abc" and cut("abc", "c") == "ab"
    asked = {"until": ["x"], "do_sample": False, "temperature": 0.7, "max_gen_toks": 32}
    settings = generation_settings(Sampling(), asked)
    assert (settings.temperature, settings.max_token) == (0.0, 32)


def test_what_the_harness_gets(tiny_sdar: Path) -> None:
    ours = make_harness_model(str(tiny_sdar), max_token=8, seed=4, masks=2)
    long, short = ours.generate([("1+2", {"until": []}), ("1+2", {"max_gen_toks": 4, "until": ["0"]})])
    engine = Engine(ours.loaded.model, ours.loaded.mask_id, ours.loaded.stop_ids)
    (alone,) = engine.generate([Request("0", ours.encode("1+2"), seed=4)], Sampling(max_token=8))
    assert long == ours.loaded.tokenizer.decode(alone.response_ids[: alone.length], skip_special_tokens=True)
    assert len(short) <= 4 and "0" not in short
    assert ours.encode_pair("1 ", "+2") == (ours.encode("1"), ours.encode(" +2"))
    stopped = make_harness_model(str(tiny_sdar), max_token=8, seed=4, stop_token_list=f"['{long[1]}']")
    assert stopped.generate([("1+2", {})]) == [long[: long.index(long[1]) + 1]] and len(long) > 2
    better, worse = ours.loglikelihood([("1+2=", "3"), ("", "1+2")])
    assert better < 0 and worse < 0


def test_mistakes_are_told(tiny_sdar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="remask"):
        make_harness_model(str(tiny_sdar), remask="static")
    with pytest.raises(UserError, match="start_with_think=True: the harness makes the prompts"):
        make_harness_model(str(tiny_sdar), start_with_think=True)
    with pytest.raises(UserError, match="pip install lm_eval"):
        register_with_harness()


def test_data_that_cannot_be_fetched_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline() -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(lm_harness, "register_with_harness", lambda: None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", SimpleNamespace(cli_evaluate=offline))
    monkeypatch.setattr(sys, "argv", ["lm_harness", "--tasks", "gsm8k"])
    with pytest.raises(SystemExit) as ended:
        lm_harness.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: --tasks: Couldn't reach 'openai/gsm8k'")
    assert "HF_HUB_OFFLINE=1" in line


TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {records}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
DRAWN = """
task: drawn
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["+"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
task: chosen
output_type: multiple_choice
doc_to_choice: ["3", "7"]
doc_to_target: "{{choice}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.command
def test_lm_eval_evaluates(tiny_sdar: Path, tmp_path: Path) -> None:
    """The harness itself, on a task that is drawn and one that is chosen; its answers are the adapter's."""
    records = [{"question": "1+2=", "answer": "3", "choice": 0}, {"question": "3+4=", "answer": "7", "choice": 1}]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in (("drawn", DRAWN), ("chosen", CHOSEN)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(records=tmp_path / "records.jsonl") + text)
    command = [sys.executable, "-m", "rollout.lm_harness", "--model", "dllm_rl", "--tasks", "drawn,chosen"]
    command += ["--model_args", f"pretrained={tiny_sdar},max_token=8,masks=4", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = make_harness_model(str(tiny_sdar), max_token=8, masks=4)
    wanted = ours.generate([(one["question"], {"until": ["+"], "do_sample": False}) for one in records])
    bounds = ours.loglikelihood([(one["question"], f" {choice}") for one in records for choice in ("3", "7")])
    samples = {name: next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")) for name in ("drawn", "chosen")}
    lines = {name: list(map(json.loads, path.read_text().splitlines())) for name, path in samples.items()}
    assert [line["resps"][0][0] for line in lines["drawn"]] == wanted
    found = [float(value) for line in lines["chosen"] for ((value, _),) in line["resps"]]
    assert found == pytest.approx(bounds, abs=1e-4)
