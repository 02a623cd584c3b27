"""A network knows so many positions: prompt and response together stay within them."""

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request
from models import LoadedModel, load_model
from models.family import longest_sequence
from models.tiny import build_tiny
from sample.engine import Engine
from sample.functions import block_diffusion_generate

POSITIONS = 22


@pytest.fixture(scope="module", params=["sdar", "llada"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp(request.param)
    build_tiny(request.param, folder, seed=3)
    loaded = load_model(folder, request.param)
    assert longest_sequence(loaded.model.config) == 512
    loaded.model.config.max_position_embeddings = POSITIONS
    return loaded


def drawn(loaded: LoadedModel, lengths: list[int], **settings: int) -> dict[int, tuple[str, int, int]]:
    """By the prompt's length: how the response ended, its length, and all its tokens."""
    requests = [Request(str(length), [1] * length, seed=1) for length in lengths]
    trajectories = Engine(loaded.model, loaded.mask_id, []).generate(requests, Sampling(**settings))
    return {int(one.task_id): (one.finish_reason, one.length, len(one.response_ids)) for one in trajectories}


def test_a_response_ends_where_the_positions_end(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    """In blocks of 4: up to position 20 where blocks are aligned to 0, else up to a whole block behind the prompt."""
    ends = {9: 20, 10: 20, 17: 20, 19: 20} if loaded.family.attention == "block" else {9: 21, 10: 22, 17: 21}
    got = drawn(loaded, [*ends], max_token=2000)
    assert got == {prompt: ("length", end - prompt, end - prompt) for prompt, end in ends.items()}
    told = capsys.readouterr().out
    assert told.count("the model has 22 positions") == 1 and "refused" not in told


def test_a_prompt_that_leaves_no_room_is_refused(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(loaded.model, loaded.mask_id, [])
    longest = engine.longest_prompt(Sampling())
    got = drawn(loaded, [longest, longest + 1, 30], max_token=3)
    assert [got[one][0] for one in (longest, longest + 1, 30)] == ["length", "refused", "refused"]
    assert "2 requests refused: their prompts leave no room in the model's 22 positions" in capsys.readouterr().out


def test_a_response_that_fits_is_as_ever(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert drawn(loaded, [8], max_token=7)[8][:2] == ("length", 7)
    assert "positions" not in capsys.readouterr().out


def test_the_functions_refuse_such_a_prompt(loaded: LoadedModel) -> None:
    prompt = torch.ones(1, 30, dtype=torch.long)
    with pytest.raises(UserError, match="a prompt of 30 tokens leaves no room"):
        block_diffusion_generate(loaded.model, prompt, loaded.mask_id, block_length=4)


@pytest.mark.parametrize(
    "rope, length",
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
    ],
)
def test_scaled_positions_count(rope: dict, length: int, tiny_sdar: Path) -> None:
    config = load_model(tiny_sdar, "sdar").model.config
    config.rope_parameters = rope
    assert longest_sequence(config) == length
