"""What sampling and training must cost on a GPU, by plain arithmetic; nothing is run.

    python -m benchmarks.cost_model --shape 8b --batch 1 64 128 --chip h100 [--context 1000 --before --longest 2048]
    python -m benchmarks.cost_model --config PATH/config.json --chip 4090

One step of the sampler and what it moves, the draw, one response in training, the memory of both. The limit of a step
is what its bytes and its arithmetic must take on that chip; the other columns are what the code as it stands should
take, from how many kernels it launches and what they move. Weights and activations are bfloat16, blocks have four
positions, attention is torch's FlashAttention over the pool of keys, without a mask. `--before` counts what stood here
earlier: transformers' modules kernel by kernel, a dense bias, the draw by the definition's words. docs/performance.md
sets measurements beside it, where there are any.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import SHAPES
from common.errors import UserError, one_line_errors
from common.memory import (
    Size,
    activation_bytes,
    adapter_parameters,
    cache_bytes,
    head_bytes,
    size_of,
    state_bytes,
)
from common.metrics import print_table
from common.records import read_object
from common.schema import LoraSettings
from sample.step import MERGE_UP_TO

GIB, BLOCK = 2**30, 4
HEAD_POSITIONS = 256  # in a chunk of the head in training, where the vocabulary is large


@dataclass(frozen=True)
class Chip:
    """A GPU's data sheet."""

    bandwidth: float  # bytes a second
    peak: float  # dense bfloat16 FLOP a second, sums in float32
    memory: float = 0.0  # bytes


# NVIDIA's data sheets of H100 SXM5 80 GB, H200 SXM, B200 SXM, A100 SXM 80 GB, L40S; of the RTX 4090 the Ada
# architecture's white paper, appendix A
CHIPS = {
    "h100": Chip(3.35e12, 989e12, 80e9),
    "h200": Chip(4.8e12, 989e12, 141e9),
    "b200": Chip(8e12, 2250e12, 180e9),
    "a100": Chip(2.039e12, 312e12, 80e9),
    "l40s": Chip(0.864e12, 362e12, 48e9),
    "4090": Chip(1.008e12, 165.2e12, 24e9),
}


def chip_of(device: str) -> str | None:
    """The chip that a device's name speaks of, None where its data sheet is not here."""
    return next((chip for chip in CHIPS if chip in device.lower()), None)


# What of the data sheet is reached; assumptions that a measurement replaces
LARGE_PRODUCT = 0.8  # of the peak, by a large product: 790 of 989 TFLOP/s were measured on an H200
STEP_PRODUCT = 0.55  # of the peak, by products of a few hundred rows
STREAMED = 0.8  # of the bandwidth, by a kernel that reads weights or logits once
ATTENDED = 0.75  # of the bandwidth, by attention
SHORT = 0.4  # of the bandwidth, by an elementwise kernel over some megabytes
LAUNCH = 1.8e-6  # seconds that the shortest kernel of a replayed graph takes
SHORTEST_ATTENTION = 14e-6  # seconds of one call of a layer's attention for one sequence
# Keys that FlashAttention reads at once where a head is 128 wide: a sequence's last ones fill half of that on average
# (flash-attention, csrc/flash_attn/src/flash_fwd_launch_template.h)
KEY_TILE = 64

# Bytes that the elementwise kernels of a layer move for each number of a width, (before, now). RMSNorm was: to float32,
# square, mean, scale, to bfloat16, weight; the sum with epsilon and the root were launches alone. Rotary was: by the
# cosine, negate a half, join, by the sine, add. The feed-forward's gate was silu, then its product.
NORM = ((6, 8, 4, 8, 6, 4, 0, 0), (4,))
ROTARY = ((4, 2, 4, 4, 6), (4,))
GATE = ((4, 6), (6,))
PRODUCTS = 7  # of matrices, in a layer

HEAD_WORD = 4  # bytes of a logit as the head's product writes it: on CUDA it ends in float32
# Bytes that the draw moves for each word of the vocabulary, operation by operation as sample/draw.py calls them, from
# the head's output on. top-k's selection is counted as four readings.
WEIGHTS = {"highest": HEAD_WORD, "difference": HEAD_WORD + 4, "exp": 8, "sum": 4}
TEMPERED = {"raw exp": 8, "raw sum": 4, "divide": 8}
SAMPLE = {"sums of groups": 4}
KEEP = {"equal, above": 10, "running count": 5, "compare, join": 11, "product": 9, "kept sum": 4}
SEARCH = {"to float64, sum": 20, "three times bits, buckets, sums": 3 * (21 + 12 + 16 + 33)}
DRAWS = {
    "greedy": WEIGHTS | {"argmax": 4},
    "temperature 1": WEIGHTS | SAMPLE,
    "temperature, top-k and top-p": WEIGHTS | TEMPERED | {"top-k": 16} | KEEP | SAMPLE,
    "temperature, top-p": WEIGHTS | TEMPERED | SEARCH | KEEP | SAMPLE,
}
# The same for a draw by the definition's own words from bfloat16 on, which is what stood here before: log_softmax, full
# running sums, stable sorts (16 each and what sorting itself takes).
READ = {"to float32": 6, "logsumexp: max, difference, exp, sum": 24, "mask token out": 8, "log_softmax": 16}
SUMMED = {"exp": 8, "running sum": 8, "kept, beyond, both": 13, "first id": 9, "last kept id": 9, "kept mass": 4}
BY_SORT = {"top-p: sort": 16, "shares, their sum": 20, "mass before": 12, "compare": 5, "mask": 13, "scatter back": 16}
PLAIN_DRAWS = {
    "greedy": READ | {"argmax": 4},
    "temperature 1": READ | SUMMED,
    "temperature, top-k and top-p": READ | {"divide": 8} | {"top-k: sort": 16, "top-k: scatter": 12} | BY_SORT | SUMMED,
    "temperature, top-p": READ | {"divide": 8} | BY_SORT | SUMMED,
}
PARTS = ("matrix products", "small kernels", "attention", "draw")  # of a step
# Kernels outside the layers, (before, now): embedding, tables, head, hash, draw, choice, record and advance
STEP_LAUNCHES = (170, 177)


@dataclass(frozen=True)
class Load:
    """What is drawn side by side."""

    batch: int
    context: float = 1000  # positions that a sequence sees, on average
    longest: float = 2048  # to which a mask makes attention read all

    @property
    def merged(self) -> bool:
        """Whether the commits ride beside the current blocks."""
        return 2 * self.batch * BLOCK <= MERGE_UP_TO

    @property
    def rows(self) -> int:
        """Tokens in the layers of one forward: the current blocks, and where it pays the commits beside them."""
        return self.batch * BLOCK * (2 if self.merged else 1)

    def positions_read(self, before: bool = False) -> float:
        """Whose keys and values a layer's attention reads, over all sequences; for commits over the pool once more."""
        if before:
            return self.batch * self.longest
        return (2 if self.merged else 1) * self.batch * (self.context + KEY_TILE / 2)


def streamed_weights(size: Size) -> int:
    """Numbers that every forward reads: the layers' matrices and the head's, not the embedding."""
    return size.layers * size.layer_weights + size.head_weights


def attention_flops(size: Size, pairs: float) -> float:
    """Scores and their products with values for so many (query, key) pairs, in all layers."""
    return 4.0 * size.layers * size.query_width * pairs


def limit_seconds(size: Size, chip: Chip, batch: int, context: float, tokens: float | None = None) -> float:
    """Seconds of a forward of `batch` sequences by bytes or by arithmetic; of each `tokens`, by default a block."""
    tokens = batch * (BLOCK if tokens is None else tokens)
    weights = streamed_weights(size)
    moved = 2 * weights + batch * cache_bytes(size, context)
    flops = 2 * weights * tokens + attention_flops(size, tokens * context)
    return max(moved / chip.bandwidth, flops / (LARGE_PRODUCT * chip.peak))


def limit_rate(size: Size, chip: Chip, batch: int, context: float, steps_per_block: float, merged: bool) -> float:
    """Tokens a second at the limit; a block takes so many denoising steps, and its commit a forward unless merged."""
    if merged:
        tokens = BLOCK * (1 + 1 / steps_per_block)
        return batch * BLOCK / steps_per_block / limit_seconds(size, chip, batch, context, tokens)
    return batch * BLOCK / (steps_per_block + 1) / limit_seconds(size, chip, batch, context)


def step_seconds(
    size: Size, chip: Chip, load: Load, draw: str = "temperature 1", before: bool = False
) -> dict[str, float]:
    """Seconds of one step of the sampler by part, as the code stands or as it was before."""
    layers, head = 2 * size.layers * size.layer_weights, 2 * size.head_weights  # bytes, and FLOP a token
    positions = load.batch * BLOCK
    flops = layers * load.rows + head * positions
    touched = layers + head + HEAD_WORD * positions * size.vocabulary
    products = max(touched / (STREAMED * chip.bandwidth), flops / (STEP_PRODUCT * chip.peak))
    moved = small_kernels(size, before)
    kernels = [max(LAUNCH, load.rows * each / (SHORT * chip.bandwidth)) for each in moved]
    read = attention_bytes(size, load, before) / (ATTENDED * chip.bandwidth)
    attention = max(size.layers * SHORTEST_ATTENTION, read)
    drawn = draw_bytes(size, load, draw, before) / (STREAMED * chip.bandwidth)
    draws = STEP_LAUNCHES[not before] * LAUNCH + drawn
    return dict(zip(PARTS, (products, size.layers * sum(kernels), attention, draws)))


def attention_bytes(size: Size, load: Load, before: bool = False) -> float:
    """Keys and values that attention reads in one step, all layers."""
    return cache_bytes(size, load.positions_read(before))


def draw_bytes(size: Size, load: Load, draw: str = "temperature 1", before: bool = False) -> float:
    """What the draw moves in one step, from the head's output on."""
    moved = PLAIN_DRAWS if before else DRAWS
    return float(load.batch * BLOCK * size.vocabulary * sum(moved[draw].values()))


def small_kernels(size: Size, before: bool = False) -> list[int]:
    """Bytes a token that each kernel of a layer moves which is no matrix product and no attention."""
    hidden, query, kv, wide = size.hidden, size.query_width, size.kv_width, size.feed_forward
    norm, rotary, gate = (counts[not before] for counts in (NORM, ROTARY, GATE))
    kernels = [moved * width for width in (hidden, hidden, query, kv) for moved in norm]
    kernels += [moved * width for width in (query, kv) for moved in rotary] + [moved * wide for moved in gate]
    kernels += [6 * hidden] * 2 + [4 * kv] * 2 + [4 * query] * 2  # sums, keys written, queries folded, heads joined
    return kernels + [4 * kv] * 2 * before  # keys and values made flat


def launches(size: Size, load: Load, before: bool = False) -> int:
    """Kernels of one step."""
    layer = len(small_kernels(size, before)) + PRODUCTS + 1  # attention
    return size.layers * layer + STEP_LAUNCHES[not before]


@dataclass(frozen=True)
class Response:
    """A response in training: the packed row of DESIGN's clean copy and a view for every step of a block."""

    prompt: int = 300
    length: int = 2000
    steps_per_block: float = 2.2

    @property
    def tokens(self) -> float:
        """In its row."""
        return self.prompt + self.length * (1 + self.steps_per_block)

    @property
    def pairs(self) -> float:
        """Of queries and the keys that they see: clean tokens the earlier ones, views all before their block."""
        whole = self.prompt + self.length
        return whole**2 / 2 + self.length * self.steps_per_block * (self.prompt + self.length / 2)


def training_flops(size: Size, response: Response, frozen: bool = False, checkpointing: bool = True) -> float:
    """FLOP of one response's forward and backward; frozen weights (LoRA) take no gradient of their own."""
    passes = 2 + (not frozen) + checkpointing
    linear = 2 * size.layers * size.layer_weights * response.tokens * passes
    head = 2 * size.head_weights * response.length * (3 + (not frozen))  # always computed anew in the backward
    attention = attention_flops(size, response.pairs) * (1 + 2.5 + checkpointing)  # five products in its backward
    return linear + head + attention


def step_rows(
    size: Size, chips: Sequence[str], batches: Sequence[int], context: float, longest: float, before: bool = False
) -> list[dict]:
    """One step of the sampler: milliseconds by part, the limit and the share of it that is reached."""
    rows = []
    for name in chips:
        for batch in batches:
            limit = limit_seconds(size, CHIPS[name], batch, context)
            parts = step_seconds(size, CHIPS[name], Load(batch, context, longest), before=before)
            total = sum(parts.values())
            shown = {part: f"{1e3 * seconds:.1f}" for part, seconds in ({"limit": limit} | parts).items()}
            shown |= {"sum": f"{1e3 * total:.1f}", "of the limit": f"{100 * limit / total:.0f} %"}
            rows.append({"chip": name, "batch": batch} | shown)
    return rows


def moved_rows(size: Size, batches: Sequence[int], context: float, longest: float) -> list[dict]:
    """What attention and the draw move in one step, GB, and the kernels of the step: before and as it is done."""
    rows = []
    for batch in batches:
        load = Load(batch, context, longest)
        before, now = (
            (attention_bytes(size, load, earlier) / 1e9, draw_bytes(size, load, before=earlier) / 1e9)
            for earlier in (True, False)
        )
        row = {"batch": batch, "keys and values seen": f"{batch * cache_bytes(size, context) / 1e9:.1f}"}
        row |= {"attention before": f"{before[0]:.1f}", "attention": f"{now[0]:.1f}"}
        row |= {"draw before": f"{before[1]:.2f}", "draw": f"{now[1]:.2f}"}
        rows.append(row | {"kernels before": launches(size, load, True), "kernels": launches(size, load)})
    return rows


def draw_rows(size: Size, chips: Sequence[str], batch: int) -> list[dict]:
    """Bytes that the draw moves for each position and word, by the plain definition and as it is done; its ms."""
    rows = []
    for draw, moved in DRAWS.items():
        row = {"draw": draw, "bytes before": sum(PLAIN_DRAWS[draw].values()), "bytes": sum(moved.values())}
        seconds = {name: step_seconds(size, CHIPS[name], Load(batch), draw)["draw"] for name in chips}
        rows.append(row | {f"{name}, ms": f"{1e3 * value:.1f}" for name, value in seconds.items()})
    return rows


def training_rows(size: Size, chips: Sequence[str], response: Response) -> list[dict]:
    """One response in training with checkpointing: FLOP, and seconds at the rates of large and of middling products."""
    rows = []
    for kind, frozen in (("full", False), ("LoRA", True)):
        flops = training_flops(size, response, frozen)
        for name in chips:
            peak = CHIPS[name].peak
            rows.append(
                {
                    "training": kind,
                    "chip": name,
                    "packed tokens": f"{response.tokens:.0f}",
                    "FLOP": f"{flops:.1e}",
                    "limit s": f"{flops / (LARGE_PRODUCT * peak):.2f}",
                    "expected s": f"{flops / (STEP_PRODUCT * peak):.2f}",
                }
            )
    return rows


def memory_of(
    size: Size, kind: str, tokens: int, rank: int, devices: int = 1, value_model: bool = False
) -> dict[str, float]:
    """Bytes on one GPU by part, with checkpointing. kind: a key of `KINDS`."""
    frozen_word, zero = KINDS[kind]
    adapters = adapter_parameters(size, rank, LoraSettings().targets) if frozen_word else 0
    low = 2 if zero else 4
    if frozen_word:
        states = state_bytes(adapters, size.parameters, frozen_word=frozen_word)
        activations = activation_bytes(size, tokens, True, "frozen", frozen_word)
    else:
        states = state_bytes(size.parameters, 0, zero, devices, low)
        activations = activation_bytes(size, tokens, True, "bfloat16" if zero else "autocast")
    return {
        "weights and states": states,
        "value model": state_bytes(size.parameters, 0, zero, devices, low) if value_model else 0.0,
        "activations": activations + head_bytes(size, min(tokens, HEAD_POSITIONS)),
        "sampler's weights": 2.0 * size.parameters,
    }


# what is trained → bytes of a frozen weight (0: none is), ZeRO's stage
KINDS = {"full": (0, 0), "full, ZeRO-3": (0, 3), "LoRA": (4, 0), "LoRA, bfloat16 base": (2, 0)}


def memory_rows(size: Size, chips: Sequence[str], tokens: int, rank: int, devices: int) -> list[dict]:
    """GiB of one GPU by what is trained, and which of the chips hold it."""
    rows = []
    for kind in KINDS:
        for value_model in (False, True):
            parts = memory_of(size, kind, tokens, rank, devices, value_model)
            total = sum(parts.values())
            named = kind + (f" over {devices}" if KINDS[kind][1] else "") + (", value model" if value_model else "")
            fits = [name for name in chips if total < 0.95 * CHIPS[name].memory]
            shown = {part: f"{moved / GIB:.1f}" for part, moved in parts.items()}
            rows.append({"training": named} | shown | {"sum": f"{total / GIB:.1f}", "fits": " ".join(fits) or "none"})
    return rows


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model", description=__doc__.splitlines()[0])
    shapes = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shape", choices=shapes, default="8b")
    parser.add_argument("--config", type=Path, help="a checkpoint's config.json in place of a shape")
    parser.add_argument("--chip", choices=CHIPS, nargs="+", default=["h100"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 128], help="sequences side by side")
    parser.add_argument("--context", type=float, default=1000, help="positions that a sequence sees, on average")
    parser.add_argument("--longest", type=float, default=2048, help="positions to which a mask reads all")
    parser.add_argument("--before", action="store_true", help="a step as it was counted before, too")
    parser.add_argument("--tokens", type=int, default=16384, help="training: tokens of a micro-batch")
    parser.add_argument("--rank", type=int, default=64, help="training: rank of LoRA's adapters")
    parser.add_argument("--devices", type=int, default=8, help="training: devices under ZeRO-3")
    options = parser.parse_args()
    for key in ("batch", "context", "longest", "tokens", "rank", "devices"):
        given = getattr(options, key)
        if min(given if isinstance(given, list) else [given]) <= 0:
            raise UserError(f"--{key}: must be above 0")
    size = size_of(read_object(options.config, "--config") if options.config else SHAPES[options.shape])
    name, chips = options.config or options.shape, options.chip
    loads = (options.batch, options.context, options.longest)
    title = f"{name}, {size.parameters / 1e9:.2f} B: one step of the sampler, ms"
    if options.before:
        print_table(step_rows(size, chips, *loads, before=True), title=f"{title}, before")
    print_table(step_rows(size, chips, *loads), title=title)
    print_table(moved_rows(size, *loads), title="\nGB that attention and draw move in a step, and its kernels")
    print_table(draw_rows(size, chips, max(options.batch)), title=f"\nthe draw of {max(options.batch)} blocks")
    print_table(training_rows(size, chips, Response()), title="\none response in training, checkpointed")
    memory = memory_rows(size, chips, options.tokens, options.rank, options.devices)
    print_table(
        memory, title=f"\nGiB of one GPU in RL, micro-batches of {options.tokens} tokens, LoRA r {options.rank}"
    )


if __name__ == "__main__":
    main()
