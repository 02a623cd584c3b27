"""Which software this is: for fingerprints of results, and for the doctor."""

import importlib.metadata
import platform
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMERIC = ("torch", "transformers", "tokenizers", "numpy", "math-verify")  # whose versions can change a result


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def project_version() -> str:
    """The project's version, with the commit where it is a git checkout and `+changes` where files differ from it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = "+changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{version} {commit}{changed}".strip()


def versions() -> dict[str, str]:
    """Of Python, this project and the packages whose versions can change a result."""
    found = {package: version_of(package) for package in NUMERIC}
    return {"python": platform.python_version(), "dllm-rl": project_version()} | {
        package: version for package, version in found.items() if version
    }


def _git(*arguments: str) -> str:
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
