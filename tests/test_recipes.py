"""Every published objective on two responses, read plainly: views, coefficients, ratios of terms, loss and gradient.

The plain reading knows of our code only which tokens each view shows and predicts, and checks those against the method.
"""

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as plain
from accelerate import Accelerator
from scored import scored
from torch import Tensor

from benchmarks import recipe_costs
from common.config import load_config
from common.config_files import recipes
from common.errors import UserError
from common.jobs import RLConfig
from common.schema import NEEDS, RLTrainingConfig
from common.trajectory import ScoredTrajectory, Trajectory
from models import LoadedModel, find_family, load_model
from models.tiny import build_tiny
from train import packing
from train.learner import Learner
from train.network import Policy
from train.recipes import keys_of_recipe, main, table
from train.rl_step import learn
from train.views import Layout, Views, check_views, layout_of, view_method

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DOCS = CONFIGS.parent / "docs" / "objectives.md"
BLOCK, LIMIT, SEED = 4, 20, [5, 1]
ADVANTAGES = [1.0, -0.6]
COPIES = 2  # random ones of a response
NEEDED = {"coupled_grpo": "full", "diffu_grpo": "full", "ebpo": "block", "espo": "full", "gdpo": "full"}
CASES = [
    *[("sdar", name) for name in ("tracerl", "random_masking", "coupled", "ebpo", "just_grpo", "dapo")],
    *[("dream", name) for name in ("tracerl", "coupled", "coupled_grpo", "diffu_grpo", "espo", "gdpo", "dapo")],
]


@dataclass
class Prediction:
    """A token that a view predicts, with its coefficient in its term."""

    response: int
    view: int
    index: int  # in the response
    coefficient: float
    logp: Tensor  # with gradient
    old: float
    reference: float


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    """Under block attention, and under full attention with predictions one position earlier."""
    folder = tmp_path_factory.mktemp("recipes")
    for family in ("sdar", "dream"):
        build_tiny(family, folder / family, seed=2)
    return {family: load_model(folder / family, family) for family in ("sdar", "dream")}


def settings(family: str, name: str) -> RLTrainingConfig:
    """The recipe on the family's published config, in a single update."""
    keys = [f"recipe={name}", f"rollout.max_token={LIMIT}", "training.updates_per_step=1"]
    if name in ("random_masking", "coupled"):
        keys.append(f"training.mask_times_per_sample={COPIES}")  # theirs to choose
    return load_config("rl", [f"config={CONFIGS / f'rl_{family}.yaml'}", *keys]).training


def responses(network: LoadedModel) -> list[ScoredTrajectory]:
    """Two, the second of which ends before its last token, with log-probabilities of an engine near the policy's."""
    rng, found = np.random.default_rng(4), []
    for prompt, blocks, cut, advantage in zip((8, 6), (5, 5), (0, 6), ADVANTAGES):
        one = plain.random_trajectory(rng, prompt, blocks, BLOCK, 30, network.mask_id)
        count = len(one.response_ids)
        logp = rng.normal(-4, 0.2, count).tolist()
        found.append(scored(replace(one, length=count - cut, logp=logp), advantage))
    return found


# ---- the views that a method makes


def check_noise(views: Views, one: Trajectory, training: RLTrainingConfig, layout: Layout) -> list[float]:
    """The coefficient of each view's predictions by the method's formula; fails where the views are another's."""
    length = min(one.length + training.post_num, len(one.response_ids))
    inside = views.response_index >= 0
    assert (views.inputs[views.predict] == layout.mask_id).all()
    assert (views.inputs[inside & (views.response_index >= length)] == layout.mask_id).all() or (
        training.method == "TraceRL"
    )
    masks = views.predict.sum(1)
    everywhere = np.zeros(length, dtype=int)
    np.add.at(everywhere, views.response_index[views.predict], 1)
    match training.method:
        case "TraceRL":
            assert (everywhere == 1).all()
        case "coupled":
            assert (everywhere == training.mask_times_per_sample).all()
        case "coupled_whole":
            assert masks.tolist()[0] == length and (everywhere == 2).all() and len(views) == 3
            share = np.random.default_rng([*SEED, 0 if one.length == len(one.response_ids) else 1]).uniform(0.2, 0.8)
            return [1 / 2, 1 / (2 * share), 1 / (2 * (1 - share))]
        case "whole":
            assert len(views) == 1 and masks[0] == length
            noised = views.prompt == layout.mask_id
            assert ((views.prompt == np.array(one.prompt_ids)) | noised).all()
        case "counts":
            assert length == len(one.response_ids), "the whole canvas"
            assert (everywhere == 2).all() and len(views) in (3, 4)
            return [1 / (mask * 4) for mask in masks.tolist()]
        case "quadrature":
            root = np.sqrt(3 / 5)
            levels, weights = [(1 - root) / 2, 1 / 2, (1 + root) / 2], [5 / 18, 8 / 18, 5 / 18]
            assert masks.tolist() == [max(1, int(level * length)) for level in levels]
            return [weight / level / length for level, weight in zip(levels, weights)]
        case "stratified":
            coefficients = []
            for block, mask in zip(views.block, masks):
                size = int((inside & (views.response_index < length))[views.block == block][0].sum())
                coefficients.append(size / mask / 4)
                if size == BLOCK:  # a level of each quarter: one, two, three and four masks
                    assert sorted(masks[views.block == block]) == [1, 2, 3, 4]
            return coefficients
    return [1.0] * len(views)


# ---- the objective


def view_logp(network: LoadedModel, one: Trajectory, views: Views, number: int) -> Tensor:
    """log-probabilities of a view's predictions in a forward of its own."""
    if not views.whole:
        start = int(views.block[number]) * BLOCK
        ids = (one.prompt_ids + one.response_ids)[:start] + views.inputs[number].tolist()
        logits, at = plain.block_causal_logits(network.model, ids, BLOCK), start
    else:
        prompt = one.prompt_ids if views.prompt is None else views.prompt[number].tolist()
        ids = torch.tensor([prompt + views.inputs[number].tolist()])
        everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        logits = network.model(input_ids=ids, attention_mask=everything, use_cache=False).logits[0]
        at = len(prompt) + network.family.logit_offset
    allowed = torch.arange(logits.shape[-1]) != network.mask_id
    logp = torch.where(allowed, logits / one.temperature, -torch.inf).log_softmax(-1)
    offsets = np.flatnonzero(views.predict[number])
    return logp[at + offsets, views.targets[number][offsets]]


def term_of(one: Prediction, training: RLTrainingConfig) -> tuple:
    kinds = {"token": (one.response, one.view, one.index), "position": (one.response, one.index)}
    return kinds.get(training.term, (one.response,))


def plain_loss(predictions: Sequence[Prediction], training: RLTrainingConfig) -> Tensor:
    """The mean over terms of the clipped objective and the KL."""
    terms: dict[tuple, list[Prediction]] = defaultdict(list)
    for one in predictions:
        terms[term_of(one, training)].append(one)
    estimator = "k3" if training.use_kl_estimator_k3 else "k2"
    views = {(one.response, one.view): 0 for one in predictions}
    for one in predictions:
        views[one.response, one.view] += 1
    total = torch.zeros(())
    for members in terms.values():
        first = members[0]
        logp = sum(one.coefficient * one.logp for one in members)
        old, reference = (sum(one.coefficient * getattr(one, name) for one in members) for name in ("old", "reference"))
        token = plain.PlainToken(logp, float(old), float(reference), ADVANTAGES[first.response], 0)
        policy = plain.policy_term(token, training.eps, 0.0, estimator, training.eps_high)
        kl = plain.policy_term(replace(token, advantage=0.0), training.eps, 1.0, estimator)
        norm = "sequence" if training.term == "sequence" else training.loss_norm
        weight = {
            "sequence": 1 / len(ADVANTAGES),
            "token": 1 / len(terms),
            "length": 1 / (LIMIT * len(ADVANTAGES) * (1 if training.method == "TraceRL" else COPIES)),
            "view": 1 / (len(views) * views[first.response, first.view]),
        }[norm]
        kl_weight = weight
        if training.kl_norm == "view_sum":
            kl_weight = 1 / len(views)
        elif training.kl_norm == "length":
            kl_weight = weight * len({one.index for one in members})
        beta = 0.0 if training.kl_reference == "none" else training.beta
        total = total + weight * policy + beta * kl_weight * kl
    return total


def learner_of(network: LoadedModel) -> tuple[Learner, plain.RecordingSGD]:
    optimizer = plain.RecordingSGD(list(network.model.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Learner(Policy(network.model, network.mask_id), optimizer, scheduler, Accelerator(), 1e9), optimizer


@pytest.fixture(scope="module")
def first_models(networks: dict[str, LoadedModel]) -> dict[str, LoadedModel]:
    """Models near the policies, for KLs to the first model."""
    torch.manual_seed(1)
    found = {}
    for family, network in networks.items():
        other = type(network.model)(network.model.config).eval()
        other.load_state_dict(network.model.state_dict())
        for parameter in other.parameters():
            parameter.data.mul_(1 + 0.02 * torch.randn_like(parameter))
        found[family] = replace(network, model=other)
    return found


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_recipe_is_its_formula(
    family: str, name: str, networks: dict[str, LoadedModel], first_models: dict[str, LoadedModel]
) -> None:
    network, first = networks[family], first_models[family]
    training = replace(settings(family, name), epochs_per_step=1, old_logp="engine")
    layout, samples = layout_of(network, BLOCK), responses(network)
    predictions: list[Prediction] = []
    for number, sample in enumerate(samples):
        one = sample.trajectory
        rng = np.random.default_rng([*SEED, number])
        views = view_method(training.method)(one, layout, training, rng)
        coefficients = check_noise(views, one, training, layout)
        if views.weight is not None:
            expected = np.repeat(np.array(coefficients)[:, None], views.predict.shape[1], 1)
            np.testing.assert_allclose(views.weight[views.predict], expected[views.predict], rtol=1e-6)
        for view, coefficient in enumerate(coefficients):
            logp = view_logp(network, one, views, view)
            with torch.no_grad():
                reference = view_logp(first, one, views, view)
            for n, index in enumerate(views.response_index[view][views.predict[view]].tolist()):
                fixed = float((reference if training.kl_reference == "initial" else logp.detach())[n])
                predictions.append(Prediction(number, view, index, coefficient, logp[n], one.logp[index], fixed))
    loss = plain_loss(predictions, training)
    network.model.zero_grad()
    wanted = torch.autograd.grad(loss, list(network.model.parameters()))

    learner, optimizer = learner_of(network)
    reference = learner_of(first)[0] if training.kl_reference == "initial" else None
    figures = learn(learner, samples, training, layout, LIMIT, SEED, exact=False, reference=reference)
    assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-5)
    assert 0 <= figures["clip_fraction"] <= 1
    (found,) = optimizer.recorded
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-7


@pytest.mark.parametrize("name", [name for family, name in CASES if family == "sdar"])
def test_cut_rows_and_shared_prompts_are_the_same_update(
    name: str, networks: dict[str, LoadedModel], first_models: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision, of which the record of the tokens keeps a float32's part; against rows of their own."""
    network, first = (
        replace(one, model=deepcopy(one.model).double()) for one in (networks["sdar"], first_models["sdar"])
    )
    training = replace(settings("sdar", name), gradient_checkpointing_enable=False)
    learner, optimizer = learner_of(network)
    reference = learner_of(first)[0] if training.kl_reference == "initial" else None
    layout, figures = layout_of(network, BLOCK), []
    samples = responses(network)
    drawn = samples[0].trajectory
    again = replace(drawn, step_map=drawn.step_map[::-1], response_ids=drawn.response_ids[::-1], logp=drawn.logp[::-1])
    samples += [scored(again, -0.4), scored(replace(again, length=again.length - 3), 0.3)]
    sharing = packing.share_prompts
    # all whole and alone; some behind one prompt; all in pieces, which are smaller than their clean copy
    for budget in (0, 120, 20):
        small = replace(training, tokens_per_micro_batch=budget or 10**6)
        alone = (lambda rows, parts, _: [[part] for part in parts]) if budget == 0 else sharing
        monkeypatch.setattr(packing, "share_prompts", alone)
        figures.append(learn(learner, samples, small, layout, LIMIT, SEED, exact=False, reference=reference))
    gradients = [torch.cat([one.flatten() for one in recorded]) for recorded in optimizer.recorded]
    updates = len(gradients) // len(figures)
    for number, found in enumerate(gradients):
        whole = gradients[number % updates]
        assert (found - whole).norm() <= 1e-6 * whole.norm()
    for found in figures[1:]:
        assert found == pytest.approx(figures[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_before_the_first_update_ratios_are_one_and_the_kl_is_zero(
    family: str, name: str, networks: dict[str, LoadedModel]
) -> None:
    """Whatever the views: old_logp and the reference's are those of the very views that are trained, in every epoch."""
    network = networks[family]
    training = replace(settings(family, name), epochs_per_step=2, old_logp="recompute")
    learner, optimizer = learner_of(network)
    reference = learner if training.kl_reference == "initial" else None
    layout = layout_of(network, BLOCK)
    figures = learn(learner, responses(network), training, layout, LIMIT, SEED, exact=False, reference=reference)
    assert figures["kl"] == pytest.approx(0, abs=1e-9) and figures["clip_fraction"] == 0
    assert figures["updates"] == 2  # at a rate of 0: the policy is that of the step's start in both
    first, second = optimizer.recorded
    same = all(torch.equal(one, other) for one, other in zip(first, second))
    assert same == (training.method == "TraceRL"), "noise is fresh in each epoch"


def test_all_recipes_are_tried_and_listed() -> None:
    assert {name for _, name in CASES} == set(recipes())
    assert table() in DOCS.read_text(encoding="utf-8"), "put what python -m train.recipes prints in docs/objectives.md"
    lines = table().splitlines()
    assert len(lines) == len(recipes()) + 2 and all("arXiv" in line or "report" in line for line in lines[2:])


@pytest.mark.parametrize("name", [*sorted(NEEDED), "tracerl", "just_grpo"])
def test_what_a_recipe_costs_is_as_the_page_says(name: str) -> None:
    """Counted by the code that packs and learns; those whose views are hundreds under full attention under block's."""
    line = f"| {' | '.join(recipe_costs.costs(name, NEEDED.get(name, 'block')))} |\n"
    assert line in DOCS.read_text(encoding="utf-8"), "put what python -m benchmarks.recipe_costs prints there"


def test_what_a_group_costs_is_as_the_page_says() -> None:
    line = f"| {' | '.join(recipe_costs.group_costs(1500, 500, 16_384))} |\n"
    page = DOCS.with_name("performance.md").read_text(encoding="utf-8")
    assert line in page, "put what python -m benchmarks.recipe_costs prints there"


@pytest.mark.parametrize("name", ["tracerl", "espo", "just_grpo"])
def test_a_recipe_is_told_in_full(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key that it sets, in words that may be typed after a config, for each attention."""
    main([name])
    source, attention, *lines = capsys.readouterr().out.splitlines()
    assert source.startswith(f"{name}: ")
    assert attention == f"attention: {NEEDS.get(keys_of_recipe(name)['training.method'], 'block or full')}"
    for family, its in (("sdar", "block"), ("llada", "full")):
        if its in attention:
            typed = [line.partition("  # ")[0] for line in lines if "  # " not in line or line.endswith(f"# {its}")]
            files = f"config={CONFIGS / f'rl_{family}.yaml'}"
            assert load_config("rl", [files, *typed]) == load_config("rl", [files, f"recipe={name}"])
    assert len(lines) > 15
    for wrong, told in ((["espi"], "did you mean espo"), (["recipe=espo"], "names of recipes")):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and told in error and error.count("\n") == 1


def test_a_recipe_that_does_not_fit_is_refused() -> None:
    """When the config is read; of a family of the user's own when that is known."""
    with pytest.raises(UserError, match=r"^training.method=counts is of full attention, which .*=sdar .*; dream, lla"):
        settings("sdar", "espo")
    with pytest.raises(UserError, match=r"^training.method=stratified is of block attention, .*=dream .*, trado do"):
        settings("dream", "ebpo")
    own = replace(find_family("sdar"), name="mine:MINE")
    with pytest.raises(UserError, match=r"^training.prompt_mask=0.5 is of full attention, which .*=mine:MINE does"):
        check_views(RLConfig(training=RLTrainingConfig(prompt_mask=0.5)), own)
    for family, name in CASES:
        check_views(RLConfig(training=settings(family, name)), find_family(family))
    assert set(NEEDS.values()) == {"block", "full"}


def test_where_a_recipe_stands(tmp_path: Path) -> None:
    """In a YAML under its own keys, on the command line above them; always under the command line's."""
    path = tmp_path / "mine.yaml"
    text = "base: [rl_block]\nrecipe: dapo\nmodel: {pretrained_model: m}\ntraining: {eps: 0.1, updates_per_step: 3}\n"
    path.write_text(text)
    training = load_config("rl", [f"config={path}"]).training
    assert (training.eps, training.eps_high, training.dynamic_sampling) == (0.1, 0.28, True)
    assert (training.loss_norm, training.updates_per_step, training.gradient_checkpointing_enable) == ("token", 3, True)
    training = load_config("rl", [f"config={path}", "recipe=tracerl", "training.beta=0.5"]).training
    assert (training.eps, training.eps_high, training.dynamic_sampling) == (0.2, None, False)
    assert (training.loss_norm, training.beta, training.updates_per_step) == ("length", 0.5, 3)
    with pytest.raises(UserError, match=r"^recipe=dap: no such objective; did you mean dapo\?"):
        load_config("rl", [f"config={path}", "recipe=dap"])
    with pytest.raises(UserError, match=r"^recipe=DAPO: no such objective; did you mean dapo\?"):
        load_config("rl", [f"config={path}", "recipe=DAPO"])
    for several in ("[dapo, espo]", "{dapo: true}"):
        path.write_text(text.replace("recipe: dapo", f"recipe: {several}"))
        with pytest.raises(UserError, match=r"^recipe=.*dapo.*: no such objective; "):
            load_config("rl", [f"config={path}"])
    with pytest.raises(UserError, match=r"^recipe=.*dapo.*: no such objective; "):
        load_config("rl", [f"config={CONFIGS / 'rl_sdar.yaml'}", "recipe=[dapo]"])
