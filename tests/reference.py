"""Block-attention sampling of one sequence, written from DESIGN.md §3: plain loops, everything recomputed every step.

No cache, no batch, no slots: every denoising step runs the whole canvas under a block-causal mask. The draw and the
strategies are scalar code in numpy's float32. Only the uniform random numbers come from the project, where the hash
is their definition; `uniform` below spells that hash out in Python's own integers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from common.schema import Sampling
from common.trajectory import Request, Writing
from sample.draw import uniforms

MASK64 = (1 << 64) - 1


@dataclass
class Trace:
    """What a trajectory must say."""

    response_ids: list[int] = field(default_factory=list)
    step_map: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    kept_mass: float = 0.0
    finish_reason: str = "length"
    length: int = 0
    steps: int = 0
    forwards: int = 0
    overwritten: list[Writing] = field(default_factory=list)


@dataclass
class Candidate:
    """One position's draw."""

    token: int
    confidence: float
    logp: float
    entropy: float
    kept_mass: float
    present: float = 0.0  # probability of the token that stands there


@dataclass
class Canvas:
    """Tokens, and how each position of the response was written last; what is overwritten is kept."""

    tokens: list[int]
    mask_id: int
    written: dict[int, tuple[int, Candidate]] = field(default_factory=dict)  # step and draw
    overwritten: list[tuple[int, int, int, float]] = field(default_factory=list)  # step, position, token, logp

    def write(self, position: int, step: int, candidate: Candidate | None) -> None:
        """The candidate, or the mask token again."""
        if position in self.written:
            before, drawn = self.written[position]
            self.overwritten.append((before, position, self.tokens[position], drawn.logp))
        drawn = candidate or Candidate(self.mask_id, 0.0, 0.0, 0.0, 1.0)
        self.tokens[position], self.written[position] = drawn.token, (step, drawn)


def sample_block_attention(
    model: torch.nn.Module, mask_id: int, stop_ids: list[int], request: Request, settings: Sampling
) -> Trace:
    """The response to one request."""
    block, prompt = settings.block_size, len(request.prompt_ids)
    limit = prompt + settings.max_token
    canvas = Canvas(list(request.prompt_ids), mask_id)
    trace = Trace()
    start = prompt // block * block
    while True:
        end = start + block
        canvas.tokens += [mask_id] * (end - len(canvas.tokens))
        masked = [position for position in range(start, end) if position >= prompt]
        block_step = clean_steps = 0
        final = changed = False
        while not final:
            logits = block_logits(model, canvas.tokens, block)
            candidates = {}
            for position in range(max(start, prompt), end):
                u = uniform_of(request, position, trace.steps, "token")
                here, token = logits[position - start], canvas.tokens[position]
                candidates[position] = draw_one(here, u, mask_id, settings, likeliest=position not in masked)
                candidates[position].present = float(softmax(here)[token])
            k = static_k(block, settings.denoising_steps_per_block, block_step)
            clean_steps += not masked
            changed, final = write(canvas, masked, candidates, k, trace.steps, clean_steps, settings)
            block_step += 1
            trace.steps += 1
            trace.forwards += 1
        stops = [position for position in range(prompt, min(end, limit)) if canvas.tokens[position] in stop_ids]
        if stops or end >= limit:
            break
        if settings.merge_commit is False and changed:
            trace.forwards += 1  # the clean block's keys and values, for the blocks that follow; else in their first
        start = end
    fill(trace, canvas, range(prompt, end))
    trace.finish_reason = "stop" if stops else "length"
    trace.length = stops[0] + 1 - prompt if stops else settings.max_token
    return trace


def write(
    canvas: Canvas,
    masked: list[int],
    candidates: dict[int, Candidate],
    k: int,
    step: int,
    clean_steps: int,
    settings: Sampling,
) -> tuple[bool, bool]:
    """What the strategy writes into a block, whose `masked` positions are kept; whether anything, and whether it ends.

    `clean_steps` are the block's forwards that began without masks, this one included.
    """
    clean = not masked
    chosen = choose({i: candidates[i] for i in masked}, k, settings) if masked else []
    tokens, revoked, edited = canvas.tokens, [], []
    if settings.remasking_strategy == "revoke":
        weak = [i for i in candidates if i not in masked and candidates[i].present < settings.revoke_threshold]
        revoked = sorted(weak, key=lambda i: (candidates[i].present, i))[: len(chosen) - 1]
    if settings.remasking_strategy == "edit":
        others = [i for i in candidates if i not in masked and candidates[i].token != tokens[i]]
        edited = [i for i in others if candidates[i].confidence > settings.edit_threshold]
    for position in sorted([*chosen, *edited]):
        canvas.write(position, step, candidates[position])
    for position in revoked:
        canvas.write(position, step, None)
    masked[:] = sorted({*masked, *revoked} - {*chosen})
    final = not masked
    if settings.remasking_strategy == "edit":
        final = final and ((clean and not edited) or clean_steps >= settings.max_edit_steps)
    return bool(chosen or edited or revoked), final


def fill(trace: Trace, canvas: Canvas, response: Sequence[int]) -> None:
    """Into the trace: what the canvas holds of a response at these positions; what was never written has step -1."""
    written = [canvas.written.get(position, (-1, None)) for position in response]
    trace.response_ids = [canvas.tokens[position] for position in response]
    trace.step_map = [step for step, _ in written]
    trace.logp = [drawn.logp if drawn else 0.0 for _, drawn in written]
    trace.confidence = [drawn.confidence if drawn else 0.0 for _, drawn in written]
    trace.kept_mass = float(np.mean([drawn.kept_mass for _, drawn in written if drawn]))
    trace.overwritten = sorted(
        Writing(step, position - response[0], token, logp) for step, position, token, logp in canvas.overwritten
    )


def block_logits(model: torch.nn.Module, canvas: list[int], block: int) -> np.ndarray:
    """Logits of the canvas's last block, (block, vocab): a token sees its own block and earlier ones."""
    position = torch.arange(len(canvas))
    seen = (position[None, :] // block) <= (position[:, None] // block)
    with torch.no_grad():
        logits = model(
            torch.tensor([canvas]), attention_mask=seen[None, None], position_ids=position[None], use_cache=False
        ).logits
    return logits[0, -block:].float().numpy()


def draw_one(
    logits: np.ndarray,
    u: float,
    mask_id: int,
    settings: Sampling,
    barred: Sequence[int] = (),
    likeliest: bool = False,
) -> Candidate:
    """Draw one token from its logits (vocab,): the mask token's is minus infinity, temperature, top-k, top-p.

    What is barred is not drawn, and confidence and entropy are without it; logp and kept mass are with it.
    """
    greedy = settings.temperature == 0 or settings.top_k == 1
    raw = softmax(without(logits, barred))
    allowed = logits.copy()
    allowed[mask_id] = -np.inf
    probability = softmax(allowed / np.float32(1.0 if greedy else settings.temperature))
    allowed = probability.copy()
    allowed[list(barred)] = 0
    if settings.filter_order == "top_k_first":
        kept = keep(allowed, settings.top_k, settings.top_p)
    else:
        kept = keep(allowed, 0, settings.top_p) & keep(allowed, settings.top_k, 1.0)
    token = int(allowed.argmax()) if greedy or likeliest else inverse_cdf(allowed, kept, u)
    total = sum(allowed[i] for i in sorted(kept))
    sampled = allowed[token] / total
    of = raw.tolist() if settings.entropy_from == "raw" else [allowed[i] / total for i in sorted(kept)]
    return Candidate(
        token=token,
        confidence=float(raw[token] if settings.confidence_from == "raw" else sampled),
        logp=float(np.log(probability[token])),
        entropy=float(-sum(p * math.log(p) for p in of if p > 0)),
        kept_mass=float(total),
    )


def without(logits: np.ndarray, barred: Sequence[int]) -> np.ndarray:
    """Logits in which those of `barred` ids are minus infinity."""
    logits = logits.copy()
    logits[list(barred)] = -np.inf
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float32."""
    weight = np.exp(logits - logits.max(), dtype=np.float32)
    return weight / weight.sum(dtype=np.float32)


def keep(probability: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids left by top-k, then top-p; the token that crosses p is kept, of equals the lower id comes first."""
    ranked = sorted(range(len(probability)), key=lambda i: (-probability[i], i))
    if top_k > 0:
        ranked = ranked[:top_k]
    if top_p >= 1:
        return set(ranked)
    total = sum(probability[i] for i in ranked)
    kept, mass = set(), np.float32(0)
    for i in ranked:
        kept.add(i)
        mass += probability[i] / total
        if mass >= top_p:
            break
    return kept


def inverse_cdf(probability: np.ndarray, kept: set[int], u: float) -> int:
    """The first kept id, in id order, at which the running sum exceeds u × total; the last kept one as clamp."""
    order = [i for i in sorted(kept) if probability[i] > 0]
    total = np.float32(0)
    for i in order:
        total += probability[i]
    running = np.float32(0)
    for i in order:
        running += probability[i]
        if running > np.float32(u) * total:
            return i
    return order[-1]


def static_k(block: int, steps: int, step: int) -> int:
    """Tokens unmasked by a block's step-th step: an even split, the remainder to the first steps.

    Strategies that do not go by k may take more steps; the last one's is theirs.
    """
    split = [len(part) for part in np.array_split(np.arange(block), steps)]
    return split[min(step, steps - 1)]


def choose(candidates: dict[int, Candidate], k: int, settings: Sampling) -> list[int]:
    """The positions that the strategy unmasks; `candidates` holds the masked ones."""
    by_confidence = sorted(candidates, key=lambda i: (-candidates[i].confidence, i))
    match settings.remasking_strategy:
        case "low_confidence_static":
            return by_confidence[:k]
        case "revoke":
            return sure_or_best(candidates, 1, settings)
        case "edit":
            return sure_or_best(candidates, settings.min_unmask, settings)
        case "low_confidence_dynamic":
            return sure_or_best(candidates, k, settings)
        case "factor":
            count = 1
            while count < len(candidates) and reached(candidates[by_confidence[count]], count + 1, settings.factor):
                count += 1
            return by_confidence[:count]
        case "hierarchical":
            sure = [i for i in candidates if candidates[i].confidence >= settings.dynamic_threshold]
            for run in runs(sorted(candidates)):
                best = min(run, key=lambda i: (-candidates[i].confidence, i))
                if best not in sure and candidates[best].confidence >= settings.low_threshold:
                    sure.append(best)
            return sure or by_confidence[:1]
        case "sequential":
            return sorted(candidates)[:k]
        case "entropy_bounded":
            return within_bound({i: candidates[i].entropy for i in candidates}, settings.eb_threshold)
    raise AssertionError(settings.remasking_strategy)


def sure_or_best(candidates: dict[int, Candidate], k: int, settings: Sampling) -> list[int]:
    """All that reach the threshold, or the k most confident where those are fewer."""
    sure = [i for i in candidates if candidates[i].confidence >= settings.dynamic_threshold]
    return sorted(candidates, key=lambda i: (-candidates[i].confidence, i))[:k] if len(sure) < k else sure


def reached(candidate: Candidate, rank: int, factor: float) -> bool:
    """Whether the candidate of that rank, counted from 1, is confident enough."""
    return candidate.confidence >= 1 - factor / (rank + 1)


def runs(positions: list[int]) -> list[list[int]]:
    """Neighbours together."""
    found: list[list[int]] = []
    for position in positions:
        if found and found[-1][-1] == position - 1:
            found[-1].append(position)
        else:
            found.append([position])
    return found


def within_bound(entropy: dict[int, float], bound: float) -> list[int]:
    """Positions in order of entropy while the running sum, the position included, stays within bound; at least one."""
    order = sorted(entropy, key=lambda i: (entropy[i], i))
    chosen, total = order[:1], entropy[order[0]]
    for i in order[1:]:
        total += entropy[i]
        if total > bound:
            break
        chosen.append(i)
    return chosen


def uniform_of(request: Request, position: int, step: int, stream: str) -> float:
    """The project's random number for one position and step of a request."""
    key = torch.tensor([request.stream_key()])
    return float(uniforms(key, torch.tensor([[position]]), torch.tensor([step]), stream))


def uniform(key: int, position: int, step: int, stream: int) -> float:
    """That number in Python's integers: three rounds of splitmix64's finaliser, the upper 24 bits."""
    state = mix(key + 0x9E3779B97F4A7C15 * (position + 1))
    state = mix(state + 0xD1B54A32D192ED03 * (step + 1))
    return (mix(state + stream) >> 40) / 2**24


def mix(value: int) -> int:
    """splitmix64's finaliser."""
    value &= MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK64
    return value ^ (value >> 31)
