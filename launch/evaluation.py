"""Where an evaluation runs: in this process, in a rank for each device of this node, or on many nodes.

Over nodes every device has an engine of its own (launch/engines.py).
"""

from collections.abc import Sequence

from common.errors import UserError
from common.jobs import EvalConfig
from common.stop import exit_code_of
from launch.accelerate import launch_ranks, launched
from launch.engines import RemoteEngines
from launch.start_model import make_missing_model
from models import LoadedModel, find_family, load_tokenizer
from models.family import check_model_type, local_folder, own_block_size
from models.files import check_files
from rollout import evaluate


def evaluate_here(config: EvalConfig, arguments: Sequence[str]) -> int:
    """Run eval.py's job, started with these arguments, on this node; returns the exit code."""
    if config.experiment.deepspeed_file and not launched():
        return launch_ranks(config, "eval.py", arguments)

    def job() -> None:
        if not launched():
            make_missing_model(config)
        evaluate.main(config)

    return exit_code_of(job)


def load_everywhere(config: EvalConfig) -> tuple[LoadedModel, RemoteEngines]:
    """The engines of all nodes, and what this process needs of the model beside them: no weights."""
    import ray

    folder, family = local_folder(config.model), find_family(config.model_base)
    check_model_type(folder, family)
    check_files(folder)
    tokenizer = load_tokenizer(folder)  # before any worker: a mistake is told here
    engines = RemoteEngines(config.model, config.model_base, config.dtype, config.experiment.join_timeout)
    mask_id, stop_ids = ray.get(engines.workers[0].actor.ids.remote())
    return LoadedModel(None, tokenizer, family, mask_id, stop_ids, own_block_size(folder, family)), engines


def evaluate_over_nodes(config: EvalConfig) -> int:
    """As `rollout.evaluate.main`, by the engines of all nodes; returns the exit code."""
    size = config.rollout.tensor_parallel_size
    if size > 1:
        raise UserError(
            f"rollout.tensor_parallel_size: {size}, but over nodes every device has an engine of its own; set it to 1, "
            "or run eval.py with experiment.deepspeed_file on one node"
        )
    make_missing_model(config)
    evaluate.main(config, load_everywhere)
    return 0
