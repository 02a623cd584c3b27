"""How smooth the trace page is: python -m benchmarks.trace_page [tokens]

A response of 10,000 tokens is played in headless Chromium; times are between animation frames.
"""

import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from common.metrics import print_table
from sample.traces import trace_page

FRAMES = """() => new Promise((resolve) => {
    const times = []; let before = performance.now();
    document.getElementById('play').click();
    const frame = (now) => {
        times.push(now - before); before = now;
        if (document.getElementById('play').getAttribute('aria-label') === 'Pause') requestAnimationFrame(frame);
        else resolve(times);
    };
    requestAnimationFrame(frame);
})"""


def long_trace(count: int) -> dict:
    """A response of `count` word-like tokens, blocks of 4, 1 to 4 steps a block."""
    draw, steps, step = random.Random(0), [], 0
    for start in range(0, count, 4):
        used = draw.randint(1, 4)
        steps += [step + draw.randrange(used) for _ in range(min(4, count - start))]
        step += used
    words = ["the ", "sum ", "of ", "x", "=", "42", ".\n", "therefore ", "\\frac{1}{2} ", " "]
    return {
        "name": "long",
        "prompt": "a long one",
        "pieces": [draw.choice(words) for _ in range(count)],
        "steps": steps,
        "confidence": [draw.random() for _ in range(count)],
        "logp": [-draw.random() for _ in range(count)],
        "special": [],
        "first": 0,
        "block_size": 4,
        "length": count,
        "denoising_steps": step,
        "forwards": step + count // 4,
        "finish": "stop",
    }


def main(count: int) -> None:
    """Build, play, and print frame times."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "trace.html"
        file.write_text(trace_page([long_trace(count)], "long"), encoding="utf-8")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(file.as_uri())
        build = page.evaluate("() => { const t = performance.now(); build(0); return performance.now() - t; }")
        times = sorted(page.evaluate(FRAMES)[1:])
        whole = page.evaluate(
            "() => { show(0); const t = performance.now(); show(1e9); return performance.now() - t; }"
        )
        browser.close()
    row = {
        "tokens": count,
        "build (ms)": build,
        "frames": len(times),
        "median frame (ms)": statistics.median(times),
        "99 % (ms)": times[int(0.99 * len(times))],
        "longest (ms)": times[-1],
        "all tokens at once (ms)": whole,
    }
    print_table([row], title="the trace page, played from first to last step")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
