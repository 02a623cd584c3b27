"""The scripts by name, from any folder: dllm-rl NAME [arguments], as `dllm-rl rl config=configs/rl_tiny.yaml`."""

import runpy
import sys

from common.config_files import DEFAULT_FAMILY, find_config, read_layers
from common.errors import UserError, one_line_errors
from common.runtime import ROOT

SCRIPTS = {
    "rl": "rl.py",
    "eval": "eval.py",
    "sft": "train/sft_{family}.py",
    "generate": "generate.py",
    "serve": "serve.py",
    "multinode_rl": "multinode_rl.py",
    "multinode_eval": "multinode_eval.py",
    "doctor": "common/doctor.py",
    "config": "common/config.py",
    "compare": "rollout/compare.py",
    "report": "rollout/report.py",
    "recipes": "train/recipes.py",
    "verify_published": "rollout/verify_published.py",
}
NAMES = ", ".join(SCRIPTS)


@one_line_errors
def main() -> None:
    """Run the script that the first argument names, with the arguments behind it."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\n\n  {NAMES}\n\ndllm-rl NAME --help lists the arguments of one.")
        return
    if name not in SCRIPTS:
        raise UserError(f"dllm-rl {name}: the names are {NAMES}")
    sys.path.insert(0, str(ROOT))
    script = ROOT / SCRIPTS[name].format(family=family_of(arguments))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def family_of(arguments: list[str]) -> str:
    """The family that the arguments, or else the config that they name, are for."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    layers = read_layers(find_config(given["config"])) if "config" in given else []
    families = [layer["model.model_base"] for _, layer in layers if "model.model_base" in layer]
    family = given.get("model.model_base", families[-1] if families else DEFAULT_FAMILY)
    return family if (ROOT / SCRIPTS["sft"].format(family=family)).is_file() else DEFAULT_FAMILY
