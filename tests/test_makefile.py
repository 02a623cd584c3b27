"""`make setup` as a newcomer sees it, with a pip that only talks; `make demo`, which goes on where it was stopped."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = """#!/bin/sh
cat <<'END'
Looking in indexes: https://pypi.org/simple
Collecting torch==2.13.0 (from -r requirements.txt (line 2))
  Downloading torch-2.13.0-cp311-manylinux_2_28_x86_64.whl (766.7 MB)
Collecting rich==15.0.0
  Downloading rich-15.0.0-py3-none-any.whl (2.4 MB)
Processing /wheels/numpy-2.4.6-cp311.whl (from -r requirements.txt (line 3))
Collecting nvidia-cublas-cu12==12.8.4.1 (from torch==2.13.0->-r requirements.txt (line 2))
  Downloading nvidia_cublas_cu12-12.8.4.1-py3-none-manylinux_2_27_x86_64.whl (1.2 GB)
Requirement already satisfied: mdurl~=0.1 in ./.venv (from markdown-it-py->rich==15.0.0->-r requirements.txt (line 1))
Installing collected packages: mdurl, torch, rich
END
echo "$COMPLAINT" >&2
exit $CODE
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("code", [0, 1])
def test_setup_shows_what_it_does_and_fails_where_pip_does(tmp_path: Path, code: int) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch\n")
    for name, text in (("python", "#!/bin/sh\n"), ("pip", PIP)):
        file = tmp_path / ".venv" / "bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment = outside | {"CODE": str(code), "COMPLAINT": "ERROR: no space left" if code else ""}
    done = subprocess.run(["make", "setup"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert said[0].startswith("setup, once: ")
    assert said[1:7] == [
        "torch==2.13.0",
        "  torch-2.13.0-cp311-manylinux_2_28_x86_64.whl (766.7 MB)",
        "rich==15.0.0",
        "numpy-2.4.6-cp311.whl",
        "  nvidia_cublas_cu12-12.8.4.1-py3-none-manylinux_2_27_x86_64.whl (1.2 GB)",
        "writing all of them to .venv, a minute or two",
    ]
    assert said[7:] == ([] if code else ["setup is done"])
    assert (done.returncode == 0) == (tmp_path / ".venv" / ".ready").exists() == (code == 0)
    assert code == 0 or "ERROR: no space left" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("files", "options", "resumes"),
    [
        ([], [], False),
        (["ckpt/step-0003/trainer.json"], [], True),
        (["ckpt/step-0003/trainer.json", "summary.json"], [], False),  # it came to its end
        (["ckpt/step-0003/trainer.json"], ["SEED=2"], False),
        (["ckpt/step-0003/trainer.json"], ["ARGS=experiment.total_step=3"], False),
    ],
)
def test_a_demo_that_was_stopped_goes_on(tmp_path: Path, files: list[str], options: list[str], resumes: bool) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in [*files, "config.yaml"]:
        file = tmp_path / "runs" / "demo" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("training:\n  seed: 1\n" if name == "config.yaml" else "{}")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--old-file=setup", "demo", *options]
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, check=True)
    assert ("experiment.start_from_scratch=False" in done.stdout) == resumes and "rl.py" in done.stdout
