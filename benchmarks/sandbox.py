"""Figures of the sandbox: python -m benchmarks.sandbox [attacks|speed]; `attacks` rewrites docs/sandbox.md's tables."""

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.sandbox_attacks import ATTACKS, GROUPS, NOT_HELD, SOLUTIONS, TASKS
from common.errors import UserError
from common.schema import RewardConfig
from common.trajectory import Task
from reward.code_reward import run_tests
from reward.sandbox import Cell, Limits, Sandbox
from reward.sandbox_kinds import KINDS

DOCS = Path(__file__).resolve().parents[1] / "docs" / "sandbox.md"
LIMITS = RewardConfig(memory_mb=512, output_mb=4)


def attacks() -> None:
    """Make every attack in every kind of sandbox that runs here, and write the verdicts into the docs."""
    verdicts = {sandbox.kind(): _attack_all(sandbox) for sandbox in _each_kind()}
    rows = [_row("attack", "task", *verdicts), _row(*["---"] * (2 + len(verdicts)))]
    held = [_row("a program that …", *verdicts), _row(*["---"] * (1 + len(verdicts)))]
    for group, members in GROUPS.items():
        for name, (method, _, _) in members.items():
            rows.append(_row(name, method, *(verdict[name] for verdict in verdicts.values())))
        counts = [
            sum(not verdict[name].startswith(("not held", "UNEXPECTED")) for name in members)
            for verdict in verdicts.values()
        ]
        held.append(_row(group, *(f"{count} of {len(members)} held" for count in counts)))
    text = DOCS.read_text(encoding="utf-8")
    for name, lines in (("held", held), ("attacks", rows)):
        table = "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"])
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _: table, text, flags=re.DOTALL)  # noqa: B023
        assert count == 1
        print(*lines, sep="\n")
    DOCS.write_text(text, encoding="utf-8")


def _attack_all(sandbox: Sandbox) -> dict[str, str]:
    """The verdict on every attack in a sandbox, and whether it is another than it should be."""
    verdicts, kind = {}, sandbox.kind()
    for name, (method, program, withstood) in ATTACKS.items():
        with tempfile.TemporaryDirectory() as folder:
            secret = Path(folder, "secret.txt")
            secret.write_text("secret")
            secret.chmod(0o666)
            Path(folder).chmod(0o777)
            verdict = run_tests(program.replace("HOST", folder).replace("PORT", "9"), TASKS[method], LIMITS, sandbox)
            unchanged = os.listdir(folder) == ["secret.txt"] and secret.read_text() == "secret"
        if name in NOT_HELD[kind]:
            verdict = f"not held ({verdict})"
        elif verdict not in withstood or not unchanged:
            verdict = f"UNEXPECTED {verdict}"
        verdicts[name] = verdict
    return verdicts


def _each_kind() -> Iterator[Sandbox]:
    """One kind of sandbox after another, started; those that cannot start here are left out."""
    for kind in KINDS:
        sandbox = Sandbox([kind])
        try:
            sandbox.kind()
        except UserError as error:
            print(error)
        else:
            yield sandbox
        sandbox.close()


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |".replace(" --- ", "---")


def speed() -> None:
    """For each kind: runs a second of trivial programs, and 32 at once at a limit of one second."""
    for sandbox in _each_kind():
        _speed_of_one(sandbox)


def _speed_of_one(sandbox: Sandbox) -> None:
    print(f"{sandbox.kind()}, {len(os.sched_getaffinity(0))} processors, load {os.getloadavg()[0]:.1f}")
    cell = Cell("program", {"source": "print(1)"}, Limits())
    task, solution = TASKS["function"], SOLUTIONS["function"]
    measures = {
        "programs": lambda _: sandbox.run(cell)[0].stdout == b"1\n",
        "functions (two sandboxed processes each)": lambda _: run_tests(solution, task, sandbox=sandbox) == "passed",
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
        verdicts = list(pool.map(lambda program: run_tests(program, task, sandbox=sandbox), programs))
        print(f"32 at once at 1 s: {verdicts.count('passed')} right, {time.perf_counter() - begin:.2f} s in all")


if __name__ == "__main__":
    chosen = {"attacks": [attacks], "speed": [speed]}.get(sys.argv[1] if len(sys.argv) > 1 else "", [attacks, speed])
    for part in chosen:
        part()
