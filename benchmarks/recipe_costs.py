"""What each published objective costs for one response, counted by the code that packs and learns; no network is run.

    python -m benchmarks.recipe_costs

Two tables. The first: a response of 2,000 tokens to a prompt of 300, learned from in bfloat16, where log-probabilities
before the step are computed anew. Under block attention it has the step maps of a tiny model's rollouts, 1.58 steps a
block of 4; where it is drawn sequentially, and under full attention, one step a token. Keys are those of
`configs/rl_sdar.yaml` and `configs/rl_llada.yaml` under the recipe, but for two updates a step. The replay of a few
responses that measures the mismatch is left out, and rows are whole.

The second: packed tokens for each response of a group, of TraceRL with such step maps, when every response has a row of
its own and when they share their prompt and longer rows are in pieces, as on a GPU; and the clean tokens that pieces
take a forward more for.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from benchmarks.made_trajectories import BLOCK, MASK, make_trajectories
from common.config import load_config
from common.config_files import ROOT, recipes
from common.schema import CUDA_TOKENS, NEEDS, RLTrainingConfig
from common.trajectory import Score, ScoredTrajectory, Task
from train import rl_step
from train.attention import TILE
from train.learner import Learner
from train.packing import PackedBatch, make_rows, pack
from train.recipes import keys_of_recipe
from train.rl_step import sample_rows
from train.views import Layout, trace_views

PROMPT, RESPONSE = 300, 2000
GROUP = 16  # responses to a prompt
GROUPS = ((300, 2000), (1500, 500))  # tokens of the prompt and of each response
BUDGETS = (CUDA_TOKENS // 4, CUDA_TOKENS, 8 * CUDA_TOKENS)
GROUP_HEAD = (
    "prompt",
    "response",
    "responses",
    "budget",
    "a row each",
    "shared, in pieces",
    "of it",
    "forwarded twice",
    "most in a micro-batch",
)
CONFIGS = {"block": "rl_sdar", "full": "rl_llada"}
SEED = [0, 1]
HEAD = (
    *("recipe", "attention", "views", "packed tokens", "longest row", "passes with gradient", "without"),
    *("tokens in all", "of prompt + response", "first model", "value model"),
)


class Counting(torch.nn.Module):
    """In a policy's place: counts the tokens that come, and gives all of them the same log-probability."""

    def __init__(self) -> None:
        super().__init__()
        self.logp = torch.nn.Parameter(torch.tensor(-1.0))
        self.learned = self.read = 0

    def forward(self, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        tokens = int(batch.counted.sum())
        if torch.is_grad_enabled():
            self.learned += tokens
        else:
            self.read += tokens
        return self.logp.expand(len(batch.target)), torch.zeros(len(batch.target))


def responses(one_by_one: bool) -> list[ScoredTrajectory]:
    """Two of them, one good and one bad; `one_by_one`: a token a step."""
    found = []
    for one, advantage in zip(make_trajectories(2, [RESPONSE]), (1.0, -1.0)):
        steps = list(range(RESPONSE)) if one_by_one else one.step_map
        drawn = replace(one, prompt_ids=[0] * PROMPT, logp=[-1.0] * RESPONSE, step_map=steps)
        found.append(ScoredTrajectory(Task("t", ""), drawn, Score(advantage, advantage > 0, ""), advantage))
    return found


def counted(training: RLTrainingConfig, samples: list[ScoredTrajectory], layout: Layout) -> Counting:
    """The tokens of a step on these responses, without what measures the mismatch."""
    network = Counting()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0)
    learner = Learner(network, optimizer, schedule, SimpleNamespace(device=torch.device("cpu")), 0.0)
    reference = learner if training.kl_reference == "initial" else None
    with mock.patch.object(rl_step, "sampled_mismatch", return_value={"logp_diff_max": 0.0}):
        rl_step.learn(learner, samples, training, layout, RESPONSE, SEED, exact=False, reference=reference)
    return network


def costs(name: str, attention: str) -> tuple[str, ...]:
    """The cells of a recipe's line."""
    config = load_config("rl", [f"config={ROOT}/configs/{CONFIGS[attention]}.yaml", f"recipe={name}"])
    keys = {"updates_per_step": 2, "post_num": min(config.training.post_num, RESPONSE), "tokens_per_micro_batch": 10**9}
    training = replace(config.training, **keys)
    layout = Layout(MASK, BLOCK if attention == "block" else None)
    samples = responses(attention == "full" or config.rollout.remasking_strategy == "sequential")
    rows = sample_rows(samples[:1], training, layout, SEED)
    packed, views = sum(map(len, rows)), sum(int(row.view.max()) for row in rows) or len(rows)
    both = sum(map(len, sample_rows(samples, training, layout, SEED)))
    network = counted(training, samples, layout)
    total = (network.learned + network.read) / 2
    has_value = training.method == "TraceRL" and training.term == "token"
    return (
        *(name, attention, f"{views:,}", f"{packed:,}", f"{max(map(len, rows)):,}"),
        *(f"{network.learned / both:.3g}", f"{network.read / both:.3g}", f"{total:,.0f}"),
        f"{total / (PROMPT + RESPONSE):,.1f}",
        "kept too" if training.kl_reference == "initial" else "–",
        "may be" if has_value else "–",
    )


def group_costs(prompt: int, response: int, budget: int) -> tuple[str, ...]:
    """The cells of a group's line: packed tokens for each of its responses, padding to whole tiles among them."""
    layout, rows = Layout(MASK, BLOCK), []
    for number, made in enumerate(make_trajectories(GROUP, [response])):
        one = replace(made, prompt_ids=[0] * prompt)
        rows += make_rows(number, one.prompt_ids, one.response_ids, trace_views(one, layout))
    before = sum(map(len, rows)) / GROUP
    batches = pack(rows, budget, together=True, multiple=TILE)
    sizes = [batch.ids.numel() for batch in batches]
    after, twice = sum(sizes) / GROUP, sum(copy.ids.numel() for batch in batches for copy in batch.clean_copy) / GROUP
    return (
        *(f"{prompt:,}", f"{response:,}", f"{GROUP}", f"{budget:,}", f"{before:,.0f}", f"{after:,.0f}"),
        *(f"{after / before:.0%}", f"{twice:,.0f}", f"{max(sizes):,}"),
    )


def table() -> str:
    """Markdown: a line for each recipe under each attention that it is of."""
    lines = []
    for name in recipes():
        needed = NEEDS.get(keys_of_recipe(name)["training.method"])
        lines += [costs(name, attention) for attention in CONFIGS if needed in (None, attention)]
    return markdown(HEAD, lines)


def group_table() -> str:
    """Markdown: a line for each group and budget."""
    return markdown(GROUP_HEAD, [group_costs(*sizes, budget) for sizes in GROUPS for budget in BUDGETS])


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *lines))


if __name__ == "__main__":
    print(table(), group_table(), sep="\n", end="")
