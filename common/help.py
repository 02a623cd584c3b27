"""The text of --help, and the table of every key that makes configs/README.md."""

import json
import sys

from common.keys import default_of, keys_of
from common.layers import ENTRY_SCRIPTS, EXAMPLES, configs_of
from common.schema import JOBS

REQUIRED_ARGUMENT = {  # of jobs that need no config
    "generate": 'model=PATH [prompt="…"]',
    "trace": 'model=PATH prompt="…"',
    "serve": "model=PATH",
}

README_HEAD = """# Config keys

Written by `python -m common.config --keys > configs/README.md` from `common/schema.py`; do not edit.

A config is a short YAML: `base: [name, …]` takes the layers `base/<name>.yaml` (`{name: [family, …]}`: for those
families only), its own keys come on top, and `key=value` arguments on the command line win over both.
Lists are typed `key=[0,1]`, nothing is `key=null`.
`${section.key}` takes another key's value. `python -m common.config configs/X.yaml` prints a config in full.

In evaluation `remasking_strategy`, `block_size`, `top_k`, `temperature`, `top_p` and `dynamic_threshold` may be
lists of one length: entry i of each makes setting i, and a single value holds for all.

Of the sampling keys that neither YAML nor command line sets, `block_size` is the checkpoint's own (config.json), with
as many denoising steps a block, and full attention has its family's (`sampling` in its row under `models/`), with a
step for every token. What was taken so is printed, and stands in the run's config.yaml.
"""


def usage(job: str, description: str) -> str:
    """The text of `--help`: what the script does, how keys are set, which configs fit."""
    configs = configs_of(job)
    width = max((len(path) for path in configs), default=0)
    return "\n".join(
        [
            f"usage: python {sys.argv[0]} {REQUIRED_ARGUMENT.get(job, 'config=FILE.yaml')} [key=value …]",
            "",
            description.strip(),
            "",
            f"Any key can be set after the config, as in {EXAMPLES[job]}; lists are key=[0,1], nothing is key=null.",
            "A wrong key or value ends the program at once and names the right one.",
            "",
            *(["configs that fit:"] if configs else []),
            *(f"  {path.ljust(width)}  {comment}".rstrip() for path, comment in configs.items()),
            *([""] if configs else []),
            "All keys with their defaults: configs/README.md",
        ]
    )


def key_tables() -> str:
    """Markdown: one table per section, for all jobs that share it."""
    tables: dict[tuple[str, str], list[str]] = {}  # (section, its rows) → jobs
    for job, cls in JOBS.items():
        sections: dict[str, list[str]] = {}
        for key, (_, one) in keys_of(cls).items():
            section = key.split(".")[0] if "." in key else "top level"
            default = json.dumps(default_of(one), ensure_ascii=False)
            sections.setdefault(section, []).append(f"| `{key}` | `{default}` | {one.metadata['help']} |\n")
        for section, rows in sections.items():
            tables.setdefault((section, "".join(rows)), []).append(job)
    text = README_HEAD
    for (section, rows), jobs in tables.items():
        scripts = ", ".join(f"`{ENTRY_SCRIPTS[job]}`" for job in jobs)
        text += f"\n## {section} ({scripts})\n\n| key | default | what it is |\n|---|---|---|\n{rows}"
    return text
