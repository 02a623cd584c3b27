"""Commands of the docs name scripts, modules, configs and keys that are there; links lead somewhere.

That the commands of the README run is tests/test_readme.py's; that Python in the docs does: ELSEWHERE.
"""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from common.config import load_any, load_config
from common.schema import JOBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PAGES += [ROOT / "data" / "README.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
# Python of the docs is run by
ELSEWHERE = {
    "docs/engine.md": "test_engine_docs.py",
    "docs/families.md": "test_own_family.py",
    "docs/objectives.md": "test_recipes.py",
    "docs/rewards.md": "test_scoring.py",
    "docs/strategies.md": "test_strategies.py",
    "README.md": "test_docs.py",
}
GIVEN = {"eval.py": ["model=PATH", "dataset.eval_dataset=PATH"], "rl.py": ["model.pretrained_model=PATH"]}
OF_SCRIPT = {job.script: name for name, job in JOBS.items()}
PLACES = {"my_family:RIVER": "sdar", "FAMILY": "llada", "SEED": "1"}


def commands(text: str) -> list[str]:
    """The command lines of a page: in blocks without a language, joined where they go on, and in the text."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
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
