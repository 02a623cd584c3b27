"""One side of `benchmarks.versus`, in a process of its own; it imports nothing of this project, and is no command.

    python benchmarks/versus_side.py MODULE:FUNCTION …

The modules are imported once. A line of standard input, the JSON list [MODULE:FUNCTION, inputs], then starts a process
that calls the function with the inputs, which gives what is timed: a function without arguments. Every line "run" asks
for one call of that, and is answered by a line of JSON; "done" ends the process, and is answered when it has ended.
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

TICK = 1 / os.sysconf("SC_CLK_TCK")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path[0] = os.getcwd()  # no file beside this one may stand in for a library
    for name in sys.argv[1:]:
        importlib.import_module(name.partition(":")[0])
    while line := sys.stdin.readline():
        process = os.fork()  # a fresh heap for each, without importing anew
        if process == 0:
            serve(*json.loads(line), answers)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if status:
            sys.exit(1)
        print(json.dumps("done"), file=answers, flush=True)  # before it no line may come that is not the child's


def serve(function: str, inputs: dict[str, Any], answers: TextIO) -> None:
    """Prepare a side, and call what it gives for every line until "done"."""
    module, _, name = function.partition(":")
    run = getattr(importlib.import_module(module), name)(inputs)
    loaded = resident("VmRSS")
    print(json.dumps("ready"), file=answers, flush=True)
    while json.loads(sys.stdin.readline() or '"done"') != "done":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        faults, seconds, wall = page_faults(), processor_seconds(), time.perf_counter()
        result = run()
        told = {
            "seconds": processor_seconds() - seconds,
            "wall": time.perf_counter() - wall,
            "faults": page_faults() - faults,
            "memory": resident("VmHWM") - loaded,  # MiB above what the prepared side held
            "result": result,
        }
        print(json.dumps(told), file=answers, flush=True)


def processor_seconds() -> float:
    """Of this process, and of those that it started: they may work for it, as those that score programs do."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + TICK * sum(ticks_below(os.getpid()))


def ticks_below(parent: int) -> list[int]:
    """Ticks of each living process that descends from one, with its ended children."""
    below: dict[int, list[tuple[int, int]]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # no process, or one that ended meanwhile
            continue
        below.setdefault(int(words[1]), []).append((int(folder.name), sum(map(int, words[11:15]))))
    found, waiting = [], [parent]
    while waiting:
        for process, ticks in below.get(waiting.pop(), []):
            found.append(ticks)
            waiting.append(process)
    return found


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident(field: str) -> float:
    """MiB of this process's memory: VmRSS now, VmHWM at most."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
