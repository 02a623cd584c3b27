"""What is written down of a sequence that leaves its slot, or never had one."""

from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request, Trajectory
from sample.draw import rollout_temperature
from sample.slots import Slots


def trajectory_of(
    slots: Slots, row: int, request: Request, settings: Sampling, stop_ids: tuple[int, ...], full_attention: bool
) -> Trajectory:
    """The record of a finished sequence."""
    start = len(request.prompt_ids)
    block_end = int(slots.block_start[row]) + settings.block_size
    end = int(slots.canvas_end[row]) if full_attention else block_end
    tokens = slots.tokens[row, start:end].tolist()
    length = next((n for n, one in enumerate(tokens[: settings.max_token], 1) if one in stop_ids), 0)
    logp, confidence, _ = slots.figures[row, start:end].T.tolist()
    return Trajectory(
        task_id=request.task_id,
        sample=request.sample,
        prompt_ids=list(request.prompt_ids),
        response_ids=tokens,
        step_map=slots.step_map[row, start:end].tolist(),
        logp=logp,
        confidence=confidence,
        kept_mass=float(slots.figures[row, start:block_end, 2].mean()),
        finish_reason="stop" if length else "length",
        length=length or min(settings.max_token, len(tokens)),
        steps=int(slots.step[row]),
        forwards=int(slots.forwards[row]),
        temperature=rollout_temperature(settings),
    )


def refusal_of(request: Request, settings: Sampling) -> Trajectory:
    """The empty record of a request that cache or network could never hold."""
    return Trajectory(
        task_id=request.task_id,
        sample=request.sample,
        prompt_ids=list(request.prompt_ids),
        response_ids=[],
        step_map=[],
        logp=[],
        confidence=[],
        kept_mass=1.0,
        finish_reason="refused",
        length=0,
        steps=0,
        forwards=0,
        temperature=rollout_temperature(settings),
    )


def refused(trajectory: Trajectory) -> UserError:
    """What to tell whoever waits for the response to a request that was refused; the engine has said why."""
    return UserError(
        f"a prompt of {len(trajectory.prompt_ids)} tokens leaves no room for a response in the model's positions, or "
        "in the cache (cache_tokens); shorten it"
    )
