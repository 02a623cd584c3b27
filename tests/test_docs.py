"""Commands of the docs name scripts, modules, configs and keys that are there; links lead somewhere.

Those of docs/tiny.md run, one after the other. That the commands of the README run is tests/test_readme.py's; that
Python in the docs does: ELSEWHERE.
"""

import importlib.util
import io
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config import load_any, load_config
from common.jobs import JOBS
from common.trajectory import Trajectory
from models import load_model
from tests.test_serving import Running
from train import rl_trainer, sft_trainer
from train.packing import make_rows
from train.views import Layout

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PAGES += [ROOT / "data" / "README.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
# Python of the docs is run by
ELSEWHERE = {
    "docs/engine.md": "test_engine_docs.py",
    "docs/families.md": "test_own_family.py",
    "docs/objectives.md": "test_docs.py",
    "docs/rewards.md": "test_scoring.py",
    "docs/strategies.md": "test_strategies.py",
    "docs/tiny.md": "test_docs.py",
    "README.md": "test_docs.py",
}
GIVEN = {"eval.py": ["model=PATH", "dataset.eval_dataset=PATH"], "rl.py": ["model.pretrained_model=PATH"]}
OF_SCRIPT = {job.script: name for name, job in JOBS.items()}
PLACES = {"my_family:RIVER": "sdar", "FAMILY": "llada", "SEED": "1"}


def commands(text: str) -> list[str]:
    """The command lines of a page: in blocks without a language, joined where they go on, and in the text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(block for language, block in blocks if language in ("", "bash")).replace("\\\n", " ").splitlines()
    return [
        line for line in [*lines, *re.findall(r"`(python [^`]+)`", text)] if re.match(r"(python|accelerate) ", line)
    ]


EVERY = sorted({(name, command) for name, text in TEXTS.items() for command in commands(text)})


@pytest.mark.parametrize(("page", "command"), EVERY)
def test_a_command_names_what_is_there(page: str, command: str) -> None:
    words = [word for word in shlex.split(command, comments=True) if "…" not in word]
    if "-m" in words:
        module = words[words.index("-m") + 1]
        assert importlib.util.find_spec(module), f"{page}: no module {module}"
        return
    if words[1] in re.findall(r'^"""(\w+\.py)\b', TEXTS[page], re.MULTILINE):  # the page shows it
        return
    scripts = [word for word in words if word.endswith(".py")]
    assert scripts and (ROOT / scripts[0]).is_file(), f"{page}: {command}"
    words = words[words.index(scripts[0]) + 1 :]
    keys = [word for word in words if "=" in word and not word.startswith(("config=", "--"))]
    for written, meant in PLACES.items():
        keys = [key.replace(written, meant) for key in keys]
    config = next((word.removeprefix("config=") for word in words if word.startswith("config=")), None)
    if config:
        tiny = "configs/eval_tiny.yaml" if "eval" in scripts[0] else "configs/rl_tiny.yaml"
        load_any(ROOT / config.replace("X.yaml", tiny), [*GIVEN.get(scripts[0], []), *keys])
    elif scripts[0] in OF_SCRIPT and "--help" not in words:
        load_config(OF_SCRIPT[scripts[0]], keys)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        path, _, heading = target.partition("#")
        if not path.startswith(("http:", "https:")):
            assert not path or (folder / path).exists(), f"{page}: {target}"
            if heading:
                text = (folder / path).read_text(encoding="utf-8") if path else TEXTS[page]
                assert heading in {slug(line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}, target


def slug(heading: str) -> str:
    """The name by which a page's own heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_python_of_the_docs_is_run_somewhere(page: str) -> None:
    if "```python" in TEXTS[page]:
        test = ROOT / "tests" / ELSEWHERE[page]
        assert Path(page).name in test.read_text(encoding="utf-8"), f"{test.name} does not read {page}"


def test_the_python_of_the_readme(tiny_sdar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    for written, meant in (
        ("Gen-Verse/TraDo-8B-Instruct", str(tiny_sdar)),
        ("bfloat16", "float32"),
        ('"cuda"', '"cpu"'),
    ):
        assert written in code
        code = code.replace(written, meant)
    code = code.replace("gen_length=200", "gen_length=8").replace("What is the 10th prime? Put the answer in", "4+2")
    exec(code.replace(" \\\\boxed{}.", ""), {})
    assert capsys.readouterr().out.strip()


# what makes a command of docs/tiny.md a matter of a second
QUICK = [f"evaluation.{key}" for key in ("num_task=2", "max_token=8", "num_response_per_task=1")]
QUICK += ["experiment.trackers=[]", "reward.workers=0"]
SMALL = {
    "rl.py": [
        *QUICK,
        *("experiment.total_step=1", "training.updates_per_step=1", "training.keep_accuracy=null"),
        *("rollout.num_task_per_step=2", "rollout.num_response_per_task=2", "rollout.max_token=8"),
    ],
    "train/sft_sdar.py": [*QUICK, "training.max_steps=1", "training.batch_size=2"],
    "eval.py": ["rollout.num_task=2", "rollout.max_token=8", "reward.workers=0"],
    "generate.py": ["max_token=8"],
    "sample/get_trace_viewer.py": ["max_token=8"],
}
SERVE = "python serve.py model=runs/demo/ckpt/optimized"  # runs for ever: `Running` does as it does


def test_the_commands_of_the_tiny_models_page_run(
    tiny_sdar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one folder that has the demo's models; files that the page shows lie there."""
    page = TEXTS["docs/tiny.md"]
    for name in ("demo", "sft_tiny_sdar_1", "sft_countdown_tiny_sdar_1"):
        shutil.copytree(tiny_sdar, tmp_path / "runs" / name / "ckpt" / "optimized")
    for code in re.findall(r'```python\n(""".*?)```', page, re.DOTALL):
        (tmp_path / re.match(r'"""(\w+\.py)', code)[1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for trainer in (rl_trainer, sft_trainer):
        monkeypatch.setattr(trainer, "draw_curves", lambda *_: None)
    ran = [command for command in commands(page) if command != SERVE]
    for command in ran:
        script, *arguments = shlex.split(command)[1:]
        monkeypatch.setattr(sys, "stdin", io.StringIO("4+2\n+3\n"))  # what a chat is told
        if script == "-m":
            script, *arguments = arguments
        monkeypatch.setattr(sys, "argv", [script, *arguments, *SMALL.get(script, [])])
        try:
            if script.endswith(".py"):
                own = tmp_path / script
                runpy.run_path(str(own if own.is_file() else ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, f"{command}: {capsys.readouterr().err}"
    made = {path.parents[1].name for path in (tmp_path / "runs").glob("*/ckpt/optimized")}
    assert made >= {"my_sft", "my_rl", "my_reward", "my_strategy_rl", "my_chat", "rl_countdown_tiny"} and len(ran) >= 14


def test_the_client_of_the_tiny_models_page(tiny_sdar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(from openai.*?)```", TEXTS["docs/tiny.md"], re.DOTALL)
    server = Running(load_model(tiny_sdar, "sdar"), model="runs/demo/ckpt/optimized")
    try:
        exec(code.replace("http://127.0.0.1:8000", server.url), {})
    finally:
        server.close()
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block_size", [4, None])
def test_the_method_of_the_objectives_page(block_size: int | None) -> None:
    """docs/objectives.md: under both kinds of attention the least sure tokens are masked, the prompt's never."""
    (code,) = re.findall(r"```python\n(# least_sure.*?)```", TEXTS["docs/objectives.md"], re.DOTALL)
    exec(code, names := {})
    ids, confidence = list(range(10, 17)), [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6]
    drawn = Trajectory("0", 0, [1, 2, 3, 4, 5], ids, [0] * 7, [0.0] * 7, confidence, 1.0, "stop", 7, 7, 7, 1.0)
    training = replace(
        load_config("rl", ["config=configs/rl_tiny.yaml"]).training, lower_p=0.5, upper_p=0.5, post_num=0
    )
    views = names["least_sure"](drawn, Layout(38, block_size), training, np.random.default_rng(0))
    masked = views.inputs[views.predict]
    assert sorted(views.targets[views.predict].tolist()) == [11, 13, 15, 16] and set(masked.tolist()) == {38}
    rows = make_rows(0, drawn.prompt_ids, drawn.response_ids, views, 0)
    assert sum(len(row.target) for row in rows) == 4
