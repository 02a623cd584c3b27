"""The published objectives, as their configs say: python -m train.recipes [NAME]

With a name: its source, the attention that it is of, and every key that it sets.
"""

import sys
from pathlib import Path
from typing import Any

from common.config_files import read_recipe, recipes
from common.errors import UserError, one_line_errors, show
from common.schema import ATTENTION, NEEDS

HEAD = ("recipe", "views", "term", "mean over", "clip", "advantage", "groups", "KL", "epochs", "attention", "source")


def row_of(name: str, path: Path) -> tuple[str, ...]:
    """The cells of a recipe's line; where the two attentions differ it is block attention's."""
    keys = {key.removeprefix("training."): value for key, value in keys_of_recipe(name).items()}
    estimator = "k3" if keys["use_kl_estimator_k3"] else "k2" if keys["term"] == "sequence" else "k1"
    kl = (f"{keys['beta']} {estimator}", keys["kl_reference"], keys["kl_norm"])
    return (
        name,
        keys["method"] + (f", prompt {keys['prompt_mask']}" if keys["prompt_mask"] else ""),
        keys["term"],
        "response" if keys["term"] == "sequence" else keys["loss_norm"],
        f"{keys['eps']}" if keys["eps_high"] is None else f"{keys['eps']}, {keys['eps_high']}",
        keys["advantage"],
        "redrawn" if keys["dynamic_sampling"] else str(keys["keep_accuracy"] or "all"),
        "none" if keys["kl_reference"] == "none" else ", ".join(filter(None, kl)),
        str(keys["epochs_per_step"]),
        NEEDS.get(keys["method"], "any"),
        source_of(path),
    )


def keys_of_recipe(name: str, attention: str = "block") -> dict[str, Any]:
    """Every key that a recipe sets, for families of that attention; UserError where there is no such recipe."""
    keys: dict[str, Any] = {}
    for _, layer in read_recipe(name, ATTENTION[attention][0]):
        keys |= layer
    return keys


def source_of(path: Path) -> str:
    """Where a recipe's objective was published, as its file's first line says."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def table() -> str:
    """Markdown: a line for each recipe."""
    lines = [HEAD, ["---"] * len(HEAD), *(row_of(name, path) for name, path in recipes().items())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def described(name: str) -> str:
    """A recipe in full; a key whose value depends on the attention stands there once for each."""
    method = keys_of_recipe(name)["training.method"]
    found = {one: keys_of_recipe(name, one) for one in ATTENTION if NEEDS.get(method, one) == one}
    text = f"{name}: {source_of(recipes()[name])}\nattention: {' or '.join(found)}\n"
    for key in dict.fromkeys(key for keys in found.values() for key in keys):
        values = {f"{key}={show(keys[key])}": attention for attention, keys in found.items()}
        text += "".join(f"{line}  # {one}\n" if len(values) > 1 else f"{line}\n" for line, one in values.items())
    return text


@one_line_errors
def main(argv: list[str]) -> None:
    """Print the table, or the recipes that are named."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return
    if any("=" in argument or argument.startswith("-") for argument in argv):
        raise UserError(f"{' '.join(argv)}: expected nothing, or names of recipes, as in python -m train.recipes espo")
    print("\n".join(map(described, argv)) if argv else table(), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
