"""Scenarios in processes of their own: `Apart` starts an interpreter that has all imported, and forks for each.

`python tests/gpu/apart.py [NAME …]` runs the scenarios whose names hold one of the words, and prints a table.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
IMPORTED = ("on_engine", "on_training", "on_jobs", "planted", "launch.training", "train.sft_trainer")
LIMIT = 120  # seconds of a scenario; it takes 1 to 10 on a core of its own


class Apart:
    """An interpreter with the emulated device, which runs scenarios in forks of itself."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of processor time that the last scenario took
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, scenario: str, *args: Any, limit: int = LIMIT, **named: Any) -> dict[str, Any]:
        """What the scenario `module.function` returns; AssertionError with its output where it raises or hangs."""
        json.dump([scenario, args, named, limit], self.process.stdin)
        print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the interpreter of the scenarios is gone"
        result, output, self.seconds = json.loads(answer)
        assert result is not None, f"{scenario}{args or ''}{named or ''} fails\n{output}"
        return result

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Read orders, line by line, and answer with each scenario's result and output."""
    orders, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed here is no answer
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import patches

    patches.switch_on()
    for name in IMPORTED:
        importlib.import_module(name)

    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        for line in orders:
            with tempfile.TemporaryFile("w+", dir=folder) as output:
                child = os.fork()
                if child == 0:
                    run_here(*json.loads(line), output)
                _, status, used = os.wait4(child, 0)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # what the scenario started
                output.seek(0)
                written = output.read()
            code, result = os.waitstatus_to_exitcode(status), None
            if code == 0:
                written, _, last = written.rstrip("\n").rpartition("\n")
                result = json.loads(last)
            elif code == -signal.SIGALRM:
                written += "\nit took longer than it may"
            print(json.dumps([result, written[-6000:], used.ru_utime + used.ru_stime]), file=answers, flush=True)


def run_here(scenario: str, args: list, named: dict, limit: int, output: Any) -> None:
    """The scenario in this process, which ends with it; the last line of its output is its result."""
    os.setpgid(0, 0)
    signal.alarm(limit)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    code = 1
    try:
        module, _, function = scenario.partition(".")
        result = getattr(importlib.import_module(module), function)(*args, **named)
        sys.stdout.flush()
        print(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(words: list[str]) -> None:
    """Run and print, a line each."""
    from test_gpu_path import SCENARIOS

    apart = Apart()
    for name, (scenario, args, named) in SCENARIOS.items():
        if words and not any(word in name for word in words):
            continue
        try:
            found = ", ".join(f"{key} {value}" for key, value in apart.run(scenario, *args, **named).items())
        except AssertionError as error:
            found = "FAILS: " + str(error).strip().splitlines()[-1]
        print(f"{name:40} {apart.seconds:5.1f} s of processor  {found}", flush=True)
    apart.close()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main(sys.argv[1:])
