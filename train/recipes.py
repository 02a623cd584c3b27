"""The published objectives, as their configs say: python -m train.recipes"""

from pathlib import Path
from typing import Any

from common.config_files import read_layers, recipes
from train.views import NEEDS

HEAD = ("recipe", "views", "term", "mean over", "clip", "advantage", "groups", "KL", "epochs", "attention", "source")


def row_of(name: str, path: Path) -> tuple[str, ...]:
    """The cells of a recipe's line; where the two attentions differ it is block attention's."""
    keys: dict[str, Any] = {}
    for _, layer in read_layers(path):
        keys |= {key.removeprefix("training."): value for key, value in layer.items()}
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
        path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "),
    )


def table() -> str:
    """Markdown: a line for each recipe."""
    lines = [HEAD, ["---"] * len(HEAD), *(row_of(name, path) for name, path in recipes().items())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    print(table(), end="")
