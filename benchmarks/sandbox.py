"""Figures of the sandbox: python -m benchmarks.sandbox [attacks|speed]; `attacks` rewrites docs/sandbox.md's table."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.sandbox_attacks import ATTACKS, SOLUTIONS, TASKS
from common.trajectory import Task
from reward.code_reward import CodeLimits, run_tests
from reward.sandbox import Cell, Limits, run_cells, sandbox_kind

DOCS = Path(__file__).resolve().parents[1] / "docs" / "sandbox.md"
LIMITS = CodeLimits(memory=512 << 20, output=4 << 20)
TABLE = re.compile(r"<!-- attacks -->.*<!-- end -->", re.DOTALL)


def attacks() -> None:
    """Make every attack and write its verdict into the docs."""
    rows = ["| attack | task | verdict |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, (method, program, verdicts) in ATTACKS.items():
            verdict = run_tests(program.replace("HOST", folder).replace("PORT", "9"), TASKS[method], LIMITS)
            rows.append(f"| {name} | {method} | {verdict}{'' if verdict in verdicts else ' (UNEXPECTED)'} |")
            print(rows[-1], flush=True)
    table = "\n".join(["<!-- attacks -->", *rows, "<!-- end -->"])
    DOCS.write_text(TABLE.sub(lambda _: table, DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{len(ATTACKS)} attacks, {sum(row.endswith('| passed |') for row in rows)} passed")


def speed() -> None:
    """Runs a second of trivial programs, and 32 at once at a limit of one second."""
    print(f"{sandbox_kind()}, {len(os.sched_getaffinity(0))} processors, load {os.getloadavg()[0]:.1f}")
    cell = Cell("program", {"source": "print(1)"}, Limits())
    task, solution = TASKS["function"], SOLUTIONS["function"]
    measures = {
        "programs": lambda _: run_cells(cell)[0].stdout == b"1\n",
        "functions (two sandboxed processes each)": lambda _: run_tests(solution, task) == "passed",
    }
    for name, run in measures.items():
        with ThreadPoolExecutor(4) as pool:
            begin = time.perf_counter()
            right = sum(pool.map(run, range(400)))
            print(f"{name}: {400 / (time.perf_counter() - begin):.0f} runs/s, {right} of 400 right")
    programs = ["x = int(input())\nsum(range(10**6))\nprint(x * x + 1)"] * 32
    task = Task("io", "", None, TASKS["stdio"].record | {"test_time_limit": 1})
    with ThreadPoolExecutor(32) as pool:
        begin = time.perf_counter()
        verdicts = list(pool.map(lambda program: run_tests(program, task), programs))
        print(f"32 at once at 1 s: {verdicts.count('passed')} right, {time.perf_counter() - begin:.2f} s in all")


if __name__ == "__main__":
    chosen = {"attacks": [attacks], "speed": [speed]}.get(sys.argv[1] if len(sys.argv) > 1 else "", [attacks, speed])
    for part in chosen:
        part()
