"""What the engine is put through on the emulated device: each function is a scenario, in a process of its own.

A scenario returns what was counted; it raises where responses differ from the CPU's or the device objects.
"""

import itertools
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import patches
import torch

import sample.network
from common.memory import Drawing, sampling_bytes, size_of
from common.runtime import seed_everything
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model, tiny
from sample.cache import KeyValueCache, bytes_per_token
from sample.engine import Engine
from sample.functions import block_diffusion_generate, diffusion_generate
from sample.step import Step
from sample.strategies import STRATEGIES

BLOCK = Sampling(max_token=14, max_active=3, dynamic_threshold=0.113)  # no probability comes close to it
FULL = replace(BLOCK, block_size=8, steps=12)
LENGTHS = (3, 8, 13, 4, 9, 1, 22)
NEWER = ("factor", "hierarchical", "revoke", "edit")  # strategies that `overwriting` draws with
STOP = 14
FIGURES = dict[str, Any]


class WatchedStep(Step):
    """A step whose waits and kernels are counted, whenever its Python runs."""

    counted: list[emulation.Log]

    def __call__(self, rows: int, seen: int, first: int | None = None) -> None:
        with emulation.DEVICE.watching() as log:
            super().__call__(rows, seen, first)
        self.counted.append(log)


def watched_engine(loaded: LoadedModel) -> Engine:
    """An engine on the device whose steps are counted in `WatchedStep.counted`."""
    WatchedStep.counted = []
    engine = Engine(loaded.model, loaded.mask_id, [STOP])
    engine.step_class = WatchedStep
    assert engine.graphs is not None, "the engine takes the way of the CPU"
    return engine


def built(family: str, seed: int = 3) -> Path:
    """The folder of an untrained model of that family, made once a process."""
    folder = Path(tempfile.gettempdir()) / f"{family}-{seed}"
    if not (folder / "config.json").exists():
        tiny.LAYERS = 2  # what counts is the kinds of operations
        tiny.build_tiny(family, folder, seed)
    return folder


def on_both(family: str, seed: int = 3, dtype: torch.dtype = torch.float32) -> tuple[LoadedModel, LoadedModel]:
    """The same model on the CPU and on the device."""
    folder = built(family, seed)
    return load_model(folder, family, dtype), load_model(folder, family, dtype, "cuda")


def requests_of(lengths: Iterable[int]) -> list[Request]:
    return [Request(f"task {n}", [(n + 7 * i) % 33 for i in range(length)], n) for n, length in enumerate(lengths)]


def responses(engine: Engine, settings: Sampling, lengths: Iterable[int] = LENGTHS) -> dict[str, Trajectory]:
    return {one.task_id: one for one in engine.generate(requests_of(lengths), settings)}


def check_same(got: dict[str, Trajectory], expected: dict[str, Trajectory]) -> None:
    """The device's responses are the CPU's, to the last step."""
    assert got.keys() == expected.keys()
    for task, one in expected.items():
        for name in ("finish_reason", "response_ids", "step_map", "length", "steps", "forwards"):
            here, there = getattr(got[task], name), getattr(one, name)
            assert here == there, f"{task}: {name} is {here} on the device, {there} on the CPU"
        here, there = ([writing[:3] for writing in each.overwritten] for each in (got[task], one))
        assert here == there, f"{task}: overwritten {here} on the device, {there} on the CPU"
        apart = max((abs(a - b) for a, b in zip(got[task].logp, one.logp)), default=0.0)
        assert apart < 1e-4, f"{task}: logp differs by {apart}"


def counted(engine: Engine, waits_allowed: bool = False) -> FIGURES:
    """Waits and kernels of the steps whose Python ran; fails where a step waits, or no graph could be made."""
    logs, device = WatchedStep.counted, emulation.DEVICE
    waits = [wait for log in logs for wait in log.waits]
    if not waits_allowed:
        assert not waits, f"steps wait for the device: {waits[:3]}"
        assert engine.graphs.usable and device.captured and device.replayed, "no CUDA graph"
    assert torch.cuda.current_stream() is torch.cuda.default_stream(), "a capture's stream is still the current one"
    kernels = [log.kernels for log in logs]
    return {
        "waits": round(len(waits) / len(logs), 2),
        "kernels": round(sum(kernels) / len(logs)),
        "graphs": device.captured,
        "replays": device.replayed,
    }


def check_runs(family: str, runs: Iterable[tuple[Sampling, tuple[int, ...]]], waits_allowed: bool = False) -> FIGURES:
    """Several runs of one engine on the device, each held against a new engine on the CPU."""
    on_cpu, on_device = on_both(family)
    engine = watched_engine(on_device)
    for settings, lengths in runs:
        expected = responses(Engine(on_cpu.model, on_cpu.mask_id, [STOP]), settings, lengths)
        check_same(responses(engine, settings, lengths), expected)
    return counted(engine, waits_allowed)


# ---- scenarios


def strategies(family: str, base: dict, merge: bool | None = None) -> FIGURES:
    """Every strategy, greedy and not, filtered and not."""
    plain = replace(FULL if family != "sdar" else BLOCK, merge_commit=merge, **base)
    draws = itertools.cycle(({}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}))
    names = [name for name in STRATEGIES if name not in NEWER]
    runs = [(replace(plain, remasking_strategy=name, **draw), LENGTHS) for name, draw in zip(names, draws)]
    return check_runs(family, runs)


def overwriting(merge: bool) -> FIGURES:
    """Tokens revoked and edited, in too small a cache too; and strategies that go by no schedule."""
    plain = replace(BLOCK, merge_commit=merge, dynamic_threshold=0.063, low_threshold=0.051, revoke_threshold=0.3)
    plain = replace(plain, edit_threshold=0.093, max_edit_steps=2, factor=2.8, block_size=8)
    pressed = replace(plain, max_token=24, cache_tokens=132)
    runs = [(replace(plain, remasking_strategy=name), (3, 8, 13, 4)) for name in NEWER]
    runs += [(replace(pressed, remasking_strategy=name), (45, 41)) for name in ("revoke", "edit")]
    return check_runs("sdar", runs)


def targets(family: str) -> FIGURES:
    """Full attention: everything that positions are ranked by."""
    names = ("confidence", "margin_confidence", "neg_entropy", "random")
    return check_runs(
        family, [(replace(FULL, target=name, alg_temp=0.3 * (name == "random")), LENGTHS) for name in names]
    )


def longer_and_shorter(family: str, **base: object) -> FIGURES:
    """One engine for long prompts and responses, short ones, and long ones again."""
    plain = replace(FULL if family != "sdar" else BLOCK, max_active=4, **base)
    short = replace(plain, max_token=4, steps=4)
    longest = replace(plain, max_token=60, steps=16, dynamic_threshold=0.0)
    runs = [(longest, (50, 70, 90, 60, 80)), (short, (3, 4, 5)), (longest, (40, 60, 50)), (short, (9, 1, 8, 3, 7))]
    return check_runs(family, runs)


def memory_pressure(tokens: Iterable[int]) -> FIGURES:
    """Caches in which not all sequences fit: some give way and come back."""
    plain = replace(BLOCK, max_token=120, max_active=16, dynamic_threshold=0.0)
    lengths = tuple(range(10, 71, 6))
    return check_runs("sdar", [(replace(plain, cache_tokens=number), lengths) for number in tokens])


def full_cached(family: str) -> FIGURES:
    """Full attention with the cache, whole and within a horizon."""
    plain = replace(FULL, use_cache=True)
    runs = [(plain, LENGTHS), (replace(plain, further_horizon=4), LENGTHS), (plain, (40, 60)), (plain, LENGTHS)]
    runs.append((replace(plain, max_active=6, steps=16), (*LENGTHS, *range(2, 16))))  # rows at all steps of a block
    return check_runs(family, runs)


def cached_and_not() -> FIGURES:
    """One engine with the cache and without, longer in turn."""
    plain = replace(FULL, max_active=4)
    cached, longer = replace(plain, use_cache=True), replace(plain, max_token=32)
    return check_runs("llada", [(cached, (3, 5)), (longer, (40, 30, 9, 20, 50)), (cached, LENGTHS)])


def coming_and_going(family: str, task: int = 1, **base: object) -> FIGURES:
    """Many short responses through few rows: what it takes to let sequences in and out, a time that it happens.

    `task` requests in a row have one prompt. Copies are kernels that move a slot's keys and values to another.
    """
    on_cpu, on_device = on_both(family)
    engine, logs = watched_engine(on_device), {"admit": [], "collect": [], "copies": []}

    def counting(name: str, function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            with emulation.DEVICE.watching() as log:
                result = function(*args)
            logs[name].append(log)
            return result

        return run

    engine.admit, engine.collect = counting("admit", engine.admit), counting("collect", engine.collect)
    engine.cache_class = type("Counted", (KeyValueCache,), {"copy": counting("copies", KeyValueCache.copy)})
    settings = replace(BLOCK if family == "sdar" else FULL, max_active=8, **base)
    lengths = [3 + 11 * (n // task) % 150 for n in range(40)]
    expected = responses(Engine(on_cpu.model, on_cpu.mask_id, [STOP]), settings, lengths)
    check_same(responses(engine, settings, lengths), expected)
    figures: FIGURES = {}
    for name, least in (("admit", 1), ("collect", 25)):  # a look alone is 13 kernels
        found = [log for log in logs[name] if log.kernels >= least]
        waits, kernels = (sum(each) / len(found) for each in zip(*((len(log.waits), log.kernels) for log in found)))
        figures |= {f"{name} times": len(found), f"{name} waits": round(waits, 2), f"{name} kernels": round(kernels)}
    return figures | {"copies": sum(log.kernels for log in logs["copies"])} | counted(engine)


def mixture(family: str) -> FIGURES:
    """Experts in grouped products, norms fused, heads rotated in part."""
    return check_runs(family, [(replace(BLOCK, merge_commit=merge), LENGTHS) for merge in (True, False)])


def little_memory() -> FIGURES:
    """The cache leaves room for draw, forwards and graphs, whatever is free; all responses are there nevertheless."""
    on_cpu, on_device = on_both("sdar")
    engine, settings, lengths = watched_engine(on_device), replace(BLOCK, max_token=60, max_active=16), range(10, 71, 6)
    drawing = Drawing(11, BLOCK.block_size, 144, False)
    parts = sampling_bytes(size_of(on_device.model.config.to_dict()), drawing, word=4)
    left = 700 * bytes_per_token(on_device.model)
    emulation.DEVICE.free_memory = int(sum(parts.values()) + left)
    expected = responses(Engine(on_cpu.model, on_cpu.mask_id, [STOP]), settings, lengths)
    check_same(responses(engine, settings, lengths), expected)
    assert 0.85 * left < engine.cache.tokens * bytes_per_token(on_device.model) <= 0.9 * left
    return counted(engine)


def sleep_and_wake() -> FIGURES:
    """Memory given back and taken again, between runs and by new settings; then new weights."""
    on_cpu, on_device = on_both("sdar")
    engine, cpu = watched_engine(on_device), Engine(on_cpu.model, on_cpu.mask_id, [STOP])
    greedy = replace(BLOCK, temperature=0.0)
    for settings, change in ((BLOCK, engine.sleep), (BLOCK, engine.wake), (greedy, engine.sleep), (BLOCK, None)):
        check_same(responses(engine, settings), responses(cpu, settings))
        if change is not None:
            change()
    graphs = dict(engine.graphs.graphs)
    other_on_cpu, other_on_device = on_both("sdar", seed=4)
    for own, other in ((cpu, other_on_cpu), (engine, other_on_device)):
        own.load_weights((name, tensor.clone()) for name, tensor in other.model.named_parameters())
    check_same(responses(engine, BLOCK), responses(cpu, BLOCK))
    assert graphs and all(engine.graphs.graphs[shape] is graph for shape, graph in graphs.items()), "graphs were lost"
    return counted(engine)


def generate_functions() -> FIGURES:
    """The functions of generate.py, with prompts on the device as a tokenizer's output is put there."""
    for family, function in (("sdar", block_diffusion_generate), ("dream", diffusion_generate)):
        on_cpu, on_device = on_both(family)
        ids = torch.tensor([[5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6]])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        options = {"gen_length": 16, "block_length": 4 if family == "sdar" else 8, "seed": 5}
        expected = function(on_cpu.model, {"input_ids": ids, "attention_mask": mask}, on_cpu.mask_id, **options)
        prompt = {"input_ids": ids.to("cuda"), "attention_mask": mask.to("cuda")}
        got = function(on_device.model, prompt, on_device.mask_id, **options)
        assert got.is_cuda and torch.equal(got.cpu(), expected)
    return {}


# ---- what a GPU does otherwise


def deterministic() -> FIGURES:
    """A job makes torch deterministic; a step does nothing by sorting for it, and fills no memory."""
    seed_everything(1)
    figures = check_runs("sdar", [(replace(BLOCK, merge_commit=merge), LENGTHS) for merge in (True, False)])
    kinds = sum((log.sorted for log in WatchedStep.counted), start=emulation.Counter())
    assert not +kinds, f"sorted for determinism: {+kinds}"
    assert not any(log.filled for log in WatchedStep.counted), "uninitialised memory is filled"
    assert torch.are_deterministic_algorithms_enabled(), "training would not be deterministic any more"
    return figures


def attention_kernels(dtype: str, expected: list[str]) -> FIGURES:
    """No plan of cuDNN's for every shape, no mask that is padded at every call, nothing by single kernels."""
    _, on_device = on_both("sdar", dtype=getattr(torch, dtype))
    engine = watched_engine(on_device)
    with emulation.DEVICE.watching() as log:
        for lengths in (LENGTHS, (30, 31, 5), (17,)):
            assert len(responses(engine, BLOCK, lengths)) == len(lengths)
    assert set(log.attention) == set(expected), f"attention: {dict(log.attention)}"
    if dtype == "bfloat16":  # a step needs no mask
        in_steps = sum((one.attention for one in WatchedStep.counted), start=emulation.Counter())
        assert set(in_steps) == {"flash, pool"}, f"attention in steps: {dict(in_steps)}"
        network = engine.denoise.network
        states = torch.zeros(3, 2, network.model.config.hidden_size, dtype=torch.bfloat16, device="cuda")
        assert network.logits(states).dtype == torch.float32, "logits are rounded to the weights' precision"
    assert torch.backends.cuda.cudnn_sdp_enabled(), "others' attention would not be cuDNN's any more"
    return counted(engine) | {"attention": dict(log.attention)}


def attention_without_a_mask(family: str, spans: bool = False) -> FIGURES:
    """FlashAttention over the pool gives what the bias gives, in float32: slots widened, commits, windows, spans."""
    patches.TAKEN.add(torch.float32)
    on_cpu, on_device = on_both(family)
    engine = watched_engine(on_device)
    assert engine.kernel == "bias"
    engine.kernel = "torch"
    if family == "sdar":
        pressed = replace(BLOCK, max_token=60, max_active=16, dynamic_threshold=0.0, cache_tokens=384)
        runs = [(replace(one, merge_commit=merge), lengths) for merge in (True, False)
                for one, lengths in ((BLOCK, LENGTHS), (pressed, (10, 40, 23, 31, 66)))]  # fmt: skip
    else:
        cached = replace(FULL, use_cache=True)
        runs = [(cached, LENGTHS), (replace(cached, further_horizon=4), LENGTHS)]
    if spans:
        sample.network.SHORTEST_SPAN = 64
        runs = [(settings, (150, 3, 70)) for settings, _ in runs]
    for settings, lengths in runs:
        cpu = Engine(on_cpu.model, on_cpu.mask_id, [STOP])
        check_same(responses(engine, settings, lengths), responses(cpu, settings, lengths))
    in_steps = sum((one.attention for one in WatchedStep.counted), start=emulation.Counter())
    masked = {"efficient"} if family != "sdar" else set()  # the first forward of a block
    assert set(in_steps) == {"flash, pool"} | masked, f"attention in steps: {dict(in_steps)}"
    assert (sample.network.span_of(engine.cache.width, 3, 1, on_device.model.device) < engine.cache.width) == spans
    return counted(engine)


def many_settings(number: int = 12) -> FIGURES:
    """A server's settings vary; graphs of those that are used no more are dropped."""
    on_cpu, on_device = on_both("sdar")
    engine = watched_engine(on_device)
    engine.graphs.most = 4
    for step in range(number):
        settings = replace(BLOCK, temperature=0.5 + step / 10)
        got = responses(engine, settings, (3, 5))
        assert len(engine.graphs.graphs) <= 4, f"{len(engine.graphs.graphs)} graphs are kept"
    check_same(got, responses(Engine(on_cpu.model, on_cpu.mask_id, [STOP]), settings, (3, 5)))
    return counted(engine)


class ReadsTheDevice(WatchedStep):
    """A step that cannot be captured."""

    def advance(self, slots: Any, *rest: Any) -> None:
        super().advance(slots, *rest)
        if bool(slots.stuck.any()):
            raise AssertionError


def failed_capture() -> FIGURES:
    """Where a step cannot be captured the engine goes on without graphs, on the stream that it was on."""
    on_cpu, on_device = on_both("sdar")
    engine = watched_engine(on_device)
    engine.step_class = ReadsTheDevice
    check_same(responses(engine, BLOCK), responses(Engine(on_cpu.model, on_cpu.mask_id, [STOP]), BLOCK))
    assert not engine.graphs.usable and not engine.graphs.graphs
    return counted(engine, waits_allowed=True)


def broken_device() -> FIGURES:
    """A device-side assertion ends the run with its own words: it is no failed capture."""
    _, on_device = on_both("sdar")
    engine = watched_engine(on_device)
    record = engine.graphs.record

    def record_when_broken(*args: Any) -> None:
        emulation.DEVICE.broken = True
        record(*args)

    engine.graphs.record = record_when_broken
    try:
        responses(engine, BLOCK)
    except torch.AcceleratorError as error:
        assert "device-side assert" in str(error)
        assert engine.graphs.usable, "a broken device was taken for a step that cannot be captured"
        return {}
    raise AssertionError("the run went on")


def beside_another_thread() -> FIGURES:
    """Another thread reads from the device while graphs are captured, as a server's or a writer of checkpoints does."""
    on_cpu, on_device = on_both("sdar")
    engine, step = watched_engine(on_device), WatchedStep.__call__
    weight = next(on_device.model.parameters()).detach()

    def slow_step(self: WatchedStep, *shape: int) -> None:
        reader = threading.Thread(target=errors_of, args=(lambda: weight.cpu(), errors))
        reader.start()
        reader.join()
        step(self, *shape)

    errors: list[Exception] = []
    WatchedStep.__call__ = slow_step
    check_same(responses(engine, BLOCK), responses(Engine(on_cpu.model, on_cpu.mask_id, [STOP]), BLOCK))
    assert not errors, f"the other thread fails: {errors[0]}"
    return counted(engine)


def errors_of(work: Callable[[], object], errors: list[Exception]) -> None:
    try:
        work()
    except Exception as error:
        errors.append(error)


def routes(family: str, merge: bool) -> FIGURES:
    """Which experts tokens were given to: the CPU's, whether a step's Python ran or its graph was replayed."""
    here, there = on_both(family)
    for loaded in (here, there):
        loaded.model.set_experts_implementation("batched_mm")  # grouped products count in integers, as no CPU does
    settings, got = replace(BLOCK, merge_commit=merge), []
    engine = watched_engine(there)
    asked = [replace(request, keep_routes=True) for request in requests_of(LENGTHS)]
    for one in (Engine(here.model, here.mask_id, [STOP]), engine, engine):
        got.append({trajectory.task_id: trajectory for trajectory in one.generate(asked, settings)})
    expected = got[0]
    for drawn in got[1:]:
        check_same(drawn, expected)
        for task, trajectory in drawn.items():
            for part in ("committed", "steps"):
                ours, theirs = (getattr(one.routes, part) for one in (trajectory, expected[task]))
                assert ours.shape == theirs.shape and (ours == theirs).all(), f"{task}: {part} differ"
    return counted(engine)


def in_parts(family: str, **settings: Any) -> FIGURES:
    """Responses in parts of six denoising steps, from which they go on without their keys: they are the CPU's."""
    on_cpu, on_device = on_both(family)
    chosen = replace(FULL if family == "dream" else BLOCK, max_active=len(LENGTHS), **settings)
    engine, done, begun = watched_engine(on_device), {}, None
    while begun != []:
        engine.set_up(chosen, requests_of(LENGTHS), pace=len(LENGTHS))
        if begun is None:
            engine.add(requests_of(LENGTHS))
        for one in begun or ():
            engine.go_on(one)
        for _ in range(2):
            engine.allow(3)
            while not engine.paused:
                engine.step()
                done |= {one.trajectory.task_id: one.trajectory for one in engine.finished()}
        begun = engine.suspend()
    check_same(done, responses(Engine(on_cpu.model, on_cpu.mask_id, [STOP]), chosen))
    return counted(engine)
