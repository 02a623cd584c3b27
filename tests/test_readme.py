"""Every command of the README runs as it is written, on the tiny model in place of a large one."""

import hashlib
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`((?:python|make) [^`\s]+ [^`]+)`", README)))
# what the placeholders stand for here; {folder} has a tiny model and the runs A and B
PLACES = {
    "dataset.eval_dataset=PATH": "dataset.eval_dataset=arithmetic_4_test",
    "dataset.train_dataset=PATH": "dataset.train_dataset=arithmetic_4_train",
    "dataset.optimization_data=PATH": "dataset.optimization_data=arithmetic_4_train",
    "=PATH": "={model}",
    "config=X.yaml": "config=configs/rl_tiny.yaml",
    'prompt="…"': "prompt=4+2",
    "runs/": "{folder}/runs/",
    "configs/": f"{ROOT}/configs/",
}
QUICK = ["rollout.num_response_per_task=2", "rollout.max_token=8"]
SMALL = {
    "eval.py": [*QUICK, "rollout.num_task=2", "dataset.data_type=math", "model={model}"],
    "rl.py": [
        *(*QUICK, "model.pretrained_model={model}", "rollout.num_task_per_step=2", "experiment.total_step=1"),
        *("evaluation.num_task=2", "evaluation.max_token=8", "evaluation.num_response_per_task=1"),
        *(
            "dataset.eval_dataset=arithmetic_4_test",
            "training.updates_per_step=1",
            "training.keep_accuracy=null",
            "experiment.trackers=[]",
        ),
    ],
    "train/sft_trado.py": [
        *("model.pretrained_model={model}", "training.max_steps=1", "training.batch_size=2"),
        *("training.max_gen_length=64", "dataset.prompts.math={question}", "experiment.trackers=[]"),
    ],
    "generate.py": ["max_token=8"],
    "sample/get_trace_viewer.py": ["max_token=8", "out={folder}/trace.html"],
}
LICENCE = "283ea6cc2997a1a70da0049e09adf9317bb60ca1b51279b65196b83a69e1996b"
HAVE_RUNS = ("eval.py", "rl.py", "train/sft_trado.py")
# commands that run for ever, need more than one process or a network, and the tests that run them
ELSEWHERE = {
    "python serve.py model=PATH": "tests/test_serving.py",
    "python rl.py config=X.yaml experiment.deepspeed_file=1_node_8_gpus_deepspeed_zero3": (
        "tests/test_distributed_run.py"
    ),
    "python data/download_data.py --dataset MATH500": "tests/test_data_publishers.py",
    "python -m rollout.verify_published TraDo-8B-Instruct MATH500": "tests/test_verify_published.py",
    "python -m reward data=TASKS responses=FILE out=FILE": "tests/test_scoring.py",
    "python -m models.adapt model=PATH family=sdar out=PATH": "tests/test_adapt.py",
    'make demo ARGS="experiment.project=coin reward.function=benchmarks.coin_flip:coin_flip"': "tests/test_rl.py",
}


@pytest.fixture(scope="module")
def folder(tiny_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with two short runs of the tiny model, A and B."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("A", "B"):
        run(f"python rl.py config=configs/rl_tiny.yaml experiment.project={name}", place, tiny_sdar)
    return place


def run(command: str, folder: Path, model: Path) -> None:
    """Run a command of the README in this process."""
    for written, meant in PLACES.items():
        command = command.replace(written, meant)
    script, *arguments = shlex.split(command)[1:]
    if script == "-m":
        script, *arguments = arguments
    else:
        arguments += SMALL[script] if "--help" not in arguments else []
        if script in HAVE_RUNS and "--help" not in arguments:
            arguments.append(f"experiment.runs_dir={folder}/runs")
    arguments = [one.replace("{folder}", str(folder)).replace("{model}", str(model)) for one in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.chdir(folder)
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, f"{command} ended with {end.code}"


@pytest.mark.parametrize("command", [one for one in COMMANDS if one not in ELSEWHERE])
def test_command_runs(command: str, folder: Path, tiny_sdar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(command, folder, tiny_sdar)
    told = capsys.readouterr()
    assert told.out.strip() and "Traceback" not in told.err


def test_the_other_commands_have_tests_of_their_own() -> None:
    for command, path in ELSEWHERE.items():
        assert command in COMMANDS, f"{command} is not in the README any more"
        script = command.split()[1] if "-m" not in command else command.split()[2]
        word = {"demo": "coin_flip", "reward": "reward"}.get(script, Path(script).stem)
        assert word in (ROOT / path).read_text(encoding="utf-8"), path


def test_the_licence() -> None:
    """Apache-2.0: its whole text, and its SPDX name where packages are described."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert hashlib.sha256(text.strip().encode()).hexdigest() == LICENCE, "the text is the foundation's, to the letter"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"] == "Apache-2.0"
