"""`dllm-rl NAME …`: the scripts by name, from any folder."""

import tomllib
from pathlib import Path

import pytest

from launch import command

ROOT = Path(__file__).resolve().parents[1]


def ran(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["dllm-rl", *arguments])
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_scripts_run_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ran(monkeypatch, "rl", "--help") == 0
    assert "python rl.py" in capsys.readouterr().out
    assert ran(monkeypatch, "config", "configs/rl_tiny.yaml") == 0
    assert "project: rl_tiny" in capsys.readouterr().out


def test_another_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(monkeypatch, "trian") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rl, eval, sft" in error


@pytest.mark.parametrize(
    ("arguments", "family"),
    [
        (["config=configs/sft_llada.yaml"], "llada"),
        (["config=configs/sft_tiny.yaml", "model.model_base=dream"], "dream"),
        (["config=configs/sft_tiny.yaml"], "sdar"),
        ([], "sdar"),
    ],
)
def test_the_script_of_finetuning_is_the_familys(arguments: list[str], family: str) -> None:
    assert command.family_of(arguments) == family


def test_every_name_is_there_and_the_package_names_the_command() -> None:
    for path in command.SCRIPTS.values():
        assert (ROOT / path.format(family="sdar")).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"dllm-rl": "launch.command:main"}
