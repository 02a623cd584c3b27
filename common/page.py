"""Pages that open by double click: one HTML file whose data lie in it as JSON, and which reaches no network.

A page has `<script type="application/json" id="data">…</script>`, which `fill_page` replaces, and one script, allowed
by its hash alone. `python -m common.page FILE.html …` writes the hash after the script was edited.
"""

import base64
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from common.checkpoint import write_whole

DATA = re.compile(r'(<script type="application/json" id="data">).*?(</script>)', re.DOTALL)
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
ALLOWED = re.compile(r"script-src 'sha256-[^']*'")


def fill_page(template: str, data: Any) -> str:
    """The page with other data."""
    filled, count = DATA.subn(lambda match: match[1] + embed_json(data) + match[2], template)
    assert count == 1, "a page has one place for its data"
    return filled


def embed_json(data: Any) -> str:
    """JSON that stands inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8


def allow_script(page: str) -> str:
    """The page with the hash of its script in its content security policy."""
    (script,) = SCRIPT.findall(page)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return ALLOWED.sub(f"script-src 'sha256-{digest}'", page)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_whole(Path(name), allow_script(Path(name).read_text(encoding="utf-8")))
