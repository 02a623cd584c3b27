"""Fused norms, rotary embedding and gate, which CUDA takes, give on the CPU what transformers' own give."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from benchmarks import kernels
from benchmarks.cost_model import Load, launches
from benchmarks.shapes import SHAPES
from common.memory import size_of
from common.schema import Sampling
from common.trajectory import Request
from models import load_model
from models.norms import NORMS, FusedNorm, fuse_norms
from models.tiny import build_tiny
from sample.engine import Engine
from sample.kernels import PLAIN, compiled, rotate
from sample.network import Network, OwnKeys, bias_of, engine_attention
from sample.step import Graphs


def tiny_network(family: str, folder: Path) -> torch.nn.Module:
    """An untrained network whose norms differ from layer to layer."""
    build_tiny(family, folder, seed=5)
    model = load_model(folder, family).model
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=1.0, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def states_of(network: Network, lines: int, length: int) -> Tensor:
    """Hidden states of random tokens under a random mask."""
    generator = torch.Generator().manual_seed(lines * 100 + length)
    ids = torch.randint(0, 30, (lines, length), generator=generator)
    visible = (torch.rand(lines, 1, length, length, generator=generator) > 0.3) | torch.eye(length, dtype=torch.bool)
    attention = OwnKeys(bias_of(visible, torch.float32))
    with torch.inference_mode(), engine_attention(network.model):
        return network.forward(ids, torch.arange(length).expand(lines, -1), attention)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and guarded as ever, but run by torch's own kernels: a C++ compiler takes seconds."""
    compiled.cache_clear()
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    compiled.cache_clear()


# ---- norms


NORMS_OF_A_LAYER = {"sdar": 4, "dream": 2, "llada": 2, "sdar_moe": 4, "llada2": 4}


@pytest.mark.parametrize("family", NORMS_OF_A_LAYER)
def test_fused_norms_change_neither_names_nor_numbers(family: str, tmp_path: Path) -> None:
    model, ids = tiny_network(family, tmp_path), torch.arange(24).view(2, 12)
    results, before = [], {name: one.data_ptr() for name, one in model.named_parameters()}
    for _ in range(2):
        logits = model(ids).logits
        results.append((logits.detach(), torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))))
        fuse_norms(model)
    assert not any(isinstance(module, NORMS) for module in model.modules())
    assert sum(isinstance(module, FusedNorm) for module in model.modules()) == 4 * NORMS_OF_A_LAYER[family] + 1
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == before
    (wanted, slopes), (found, own) = results
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(own, slopes, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_a_fused_norm_is_of_the_same_precision(weight: torch.dtype, hidden: torch.dtype, autocast: bool) -> None:
    plain = Qwen3RMSNorm(32).to(weight)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(0))
    given = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(hidden)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted, found = plain(given), FusedNorm(plain)(given)
    assert found.dtype == wanted.dtype
    half = torch.bfloat16 in (weight, hidden)
    torch.testing.assert_close(found, wanted, rtol=2**-7 if half else 1e-6, atol=1e-6)


# ---- rotary embedding and gate


@pytest.mark.parametrize("rotated", [16, 8])
def test_compiled_rotation_turns_as_a_concatenation_does(rotated: int) -> None:
    query, key, cosine, sine = (
        torch.randn(3, 5, 4, 16),
        torch.randn(3, 5, 2, 16),
        torch.rand(3, 5, rotated),
        torch.rand(3, 5, rotated),
    )
    wanted = PLAIN.rotate(query, key, cosine, sine)
    assert all(torch.equal(*pair) for pair in zip(rotate(query, key, cosine, sine), wanted, strict=True))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("family", ["sdar", "llada", "llada2"])
def test_compiled_kernels_give_the_same_and_are_compiled_once(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every number of lines and tokens; all that compiles, compiles at the first forward."""
    model = tiny_network(family, tmp_path)
    plain, fused = Network(model, 16), Network(model, 16, compile_kernels=True)
    assert plain.kernels is PLAIN and capsys.readouterr().out == ""
    assert torch.allclose(states_of(fused, 2, 4), states_of(plain, 2, 4), rtol=0, atol=1e-6)
    assert fused.kernels is not PLAIN and "compiled in" in capsys.readouterr().out
    with torch.compiler.set_stance("fail_on_recompile"):
        for lines, length in ((1, 4), (3, 4), (7, 12), (16, 1)):
            found, wanted = states_of(fused, lines, length), states_of(plain, lines, length)
            assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
        states_of(Network(model, 12, compile_kernels=True), 5, 8)
    assert capsys.readouterr().out == ""


def test_where_nothing_can_be_compiled_single_kernels_are_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*_: object) -> None:
        raise ValueError("no C compiler was found")

    compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    model = tiny_network("sdar", tmp_path)
    network = Network(model, 16, compile_kernels=True)
    assert torch.equal(states_of(network, 2, 4), states_of(Network(model, 16), 2, 4))
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "not compiled" in told and "no C compiler" in told
    states_of(network, 3, 4)
    assert network.kernels is PLAIN and capsys.readouterr().out == ""
    compiled.cache_clear()


@pytest.mark.usefixtures("without_inductor")
def test_an_engine_compiles_on_cuda_and_where_it_is_not_forbidden(tiny_sdar: Path) -> None:
    loaded, requests = load_model(tiny_sdar, "sdar"), [Request(f"task {n}", [3, 4, 5 + n], n) for n in range(3)]
    found = []
    for as_on_cuda, wanted in ((False, True), (True, False), (True, True)):
        engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
        if as_on_cuda:
            engine.graphs = Graphs()
            engine.graphs.usable = False
        drawn = engine.generate(requests, Sampling(max_token=6, compile_kernels=wanted))
        found.append({one.task_id: one.response_ids for one in drawn})
        assert (engine.denoise.network.kernels is not PLAIN) == (as_on_cuda and wanted)
    assert found[0] == found[1] == found[2]


def test_a_step_of_an_8b_launches_at_most_a_thousand_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"rotate": 2, "gate": 1}  # by inductor, as `python -m benchmarks.kernels` finds by compiling
    monkeypatch.setattr(kernels, "inductor_kernels", lambda function, *_: made[function.__name__])
    (layers, step), (fused_layers, fused_step) = kernels.kernels_of_a_step(False), kernels.kernels_of_a_step(True)
    assert layers / 36 > 55 and step > 2000  # else nothing was counted
    assert fused_layers / 36 < 25 and fused_step <= 1000
    size, load = size_of(SHAPES["8b"]), Load(kernels.ROWS)
    assert [launches(size, load, before) for before in (True, False)] == pytest.approx([step, fused_step], rel=0.005)
