"""Configs: layers, types, older keys, and one line for every mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from shipped import shipped

from common.config import dump_config, key_tables, load_config, parse_or_help, settings_of, usage
from common.config_files import find_config, flatten, infer_job, read_layers
from common.errors import UserError
from common.jobs import JOBS, RLConfig
from common.keys import keys_of
from common.schema import RolloutConfig

ROOT = Path(__file__).resolve().parents[1]
RL = """# a small run
model: {pretrained_model: some/model}
dataset: {train_dataset: tasks}
rollout: {num_task_per_step: 4, num_response_per_task: 2}
training: {method: TraceRL}
"""
EVAL = "model: some/model\ndataset: {eval_dataset: tasks}\n"
SFT = "model: {pretrained_model: tiny}\ndataset: {optimization_data: records}\ntraining: {method: semi-ar}\n"
CONTENT = {"rl": RL, "eval": EVAL, "sft": SFT}


@pytest.fixture
def load(tmp_path):
    """load(job, *arguments, text=…): the config of a YAML with that text; the job's smallest one by default."""

    def run(job, *arguments, text=None, name="mine"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(CONTENT[job] if text is None else text, encoding="utf-8")
        return load_config(job, [f"config={path}", *arguments])

    return run


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


# Merging -------------------------------------------------------------------------------------------------------


def test_defaults_types_and_overrides(load):
    cfg = load("rl", "training.seed=7", "optimizer.params.learning_rate=1e-6", "training.keep_accuracy=null")
    assert isinstance(cfg, RLConfig) and isinstance(cfg.rollout, RolloutConfig)
    assert (cfg.training.seed, cfg.rollout.num_task_per_step, cfg.rollout.max_token) == (7, 4, 2000)
    assert cfg.optimizer.params.learning_rate == 1e-6 and cfg.training.keep_accuracy is None
    assert cfg.experiment.project == "mine"


@pytest.mark.parametrize("written", ["1e-6", '"1e-6"', "0.000001"])
def test_numbers_may_be_quoted(load, written):
    cfg = load(
        "rl", text=RL + f"optimizer: {{params: {{learning_rate: {written}}}}}\nevaluation: {{top_p: {written}}}\n"
    )
    assert cfg.optimizer.params.learning_rate == cfg.evaluation.top_p == 1e-6


def test_text_that_looks_like_a_number_stays_as_typed(load):
    assert load("rl", "experiment.project=2024_01").experiment.project == "2024_01"
    assert load("rl", "experiment.project=007").experiment.project == "007"
    assert load("rl", "experiment.project='1 #'").experiment.project == "1 #"
    assert load("rl", "reward.function=null").reward.function is None
    template = "[INST] a={question}: {b} # c"
    assert load("rl", f"dataset.prompts.math={template}").dataset.prompts.math == template


def test_lists_on_the_command_line(load):
    cfg = load("rl", "evaluation.top_k=[0,1]", "experiment.trackers=[]")
    assert cfg.evaluation.top_k == [0, 1] and cfg.experiment.trackers == []


def test_interpolation_is_resolved_after_the_merge(load):
    text = RL + "evaluation: {max_token: '${rollout.max_token}', eval_dataset: 'x/${experiment.project}'}\n"
    cfg = load("rl", "rollout.max_token=96", text=text, name="stem")
    assert cfg.evaluation.max_token == 96 and cfg.evaluation.eval_dataset == "x/stem"
    assert load("rl", "experiment.project=p", text=text).evaluation.eval_dataset == "x/p"


def test_layers_are_applied_in_order(load, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "low.yaml").write_text("training: {seed: 1, shrink: 2, eps: 0.1}\nreward:\n")
    (base / "high.yaml").write_text("base: low\ntraining: {seed: 2, shrink: 3}\n")
    cfg = load("rl", "training.beta=0.5", text="base: [high]\n" + RL + "  \n")
    assert (cfg.training.seed, cfg.training.shrink, cfg.training.eps, cfg.training.beta) == (2, 3, 0.1, 0.5)
    (base / "low.yaml").write_text("base: [high]\n")
    with pytest.raises(UserError, match="circle"):
        load("rl", text="base: [high]\n" + RL)
    with pytest.raises(UserError, match=r"base=hihg: no file .*there are: .*rl_block"):
        load("rl", text="base: [hihg]\n" + RL)


def test_shipped_layers_serve_configs_elsewhere(load):
    text = "base: [rl_block]\nmodel: {pretrained_model: m}\n"
    assert load("rl", text=text).training.loss_norm == "length"


def test_a_section_may_be_empty(load):
    assert load("rl", text=RL + "reward:\n  # kind: math\n").reward.kind is None


def test_lists_do_not_leak_between_configs(load):
    load("rl").experiment.trackers.append("wandb")
    assert load("rl").experiment.trackers == ["tensorboard"]


# Settings of an evaluation -----------------------------------------------------------------------------------------


def test_settings_are_zipped(load):
    lists = ["evaluation.top_k=[0,1]", "evaluation.remasking_strategy=[low_confidence_dynamic,my.module:pick]"]
    first, second = settings_of(load("rl", *lists, "evaluation.top_p=0.5").evaluation)
    assert (first.top_k, first.remasking_strategy, first.top_p) == (0, "low_confidence_dynamic", 0.5)
    assert (second.top_k, second.remasking_strategy, second.top_p) == (1, "my.module:pick", 0.5)
    assert len(settings_of(load("eval").rollout)) == 1
    assert [one.block_size for one in settings_of(load("eval", "rollout.block_size=[4,8]").rollout)] == [4, 8]


# Mistakes ----------------------------------------------------------------------------------------------------------

MISTAKES = [
    # unknown keys
    ("rl", "rollout.temprature=0.7", "unknown key rollout.temprature=0.7", "did you mean rollout.temperature?"),
    ("rl", "seed=1", "unknown key seed=1", "did you mean training.seed?"),
    ("rl", "optimiser.params.learning_rate=1", "optimiser.params", "did you mean optimizer.params.learning_rate?"),
    ("rl", "learning_rat=1", "unknown key learning_rat=1", "did you mean optimizer.params.learning_rate?"),
    ("sft", "training.update_per_step=2", "unknown key training.update_per_step=2", "did you mean"),
    ("eval", "zzzz=[1]", "unknown key zzzz=[1] in the command line", "configs/README.md"),
    ("rl", "rollout.top_k.x=1", "unknown key rollout.top_k.x=1", "did you mean rollout.top_k?"),
    ("rl", "rollout=5", "rollout=5", "rollout is a section; its keys are rollout.block_size"),
    ("rl", "model=some/model", "model=some/model", "model.pretrained_model"),
    # types
    ("rl", "training.seed=abc", "training.seed=abc", "expected a whole number"),
    ("rl", "training.seed=1.5", "training.seed=1.5", "expected a whole number"),
    ("rl", "training.seed=null", "training.seed=null", "expected a whole number"),
    ("rl", "training.eps=high", "training.eps=high", "expected a number"),
    ("rl", "training.use_kl_estimator_k3=maybe", "training.use_kl_estimator_k3=maybe", "expected true or false"),
    ("rl", "training.keep_accuracy=0.2", "training.keep_accuracy=0.2", "expected a list of numbers or null"),
    ("rl", "training.keep_accuracy=[a,b]", "training.keep_accuracy=", "expected a list of numbers or null"),
    ("rl", "experiment.trackers=wandb", "experiment.trackers=wandb", "expected a list of words"),
    ("rl", "evaluation.top_k=[0,x]", "evaluation.top_k=[0, 'x']", "expected a whole number, or a list of such"),
    ("rl", "evaluation.block_size=4.0", "evaluation.block_size=4.0", "expected a whole number"),
    ("rl", "evaluation.temperature=null", "evaluation.temperature=null", "expected a number"),
    ("rl", "evaluation.top_k=true", "evaluation.top_k=true", "expected a whole number"),
    # choices
    ("rl", "training.kl_reference=init", "training.kl_reference=init", "expected old, initial"),
    ("rl", "training.loss_norm=tokens", "training.loss_norm=tokens", "did you mean token?"),
    ("rl", "training.old_logp=x", "training.old_logp=x", "expected auto, engine, recompute, detach"),
    ("rl", "training.method=GRPO", "training.method=GRPO", "expected TraceRL"),
    ("sft", "training.method=semiar", "training.method=semiar", "did you mean semi-ar?"),
    ("rl", "rollout.confidence_from=top", "rollout.confidence_from=top", "expected raw, sampled"),
    (
        "rl",
        "rollout.remasking_strategy=dynamic",
        "rollout.remasking_strategy=dynamic",
        "did you mean low_confidence_dynamic?",
    ),
    ("rl", "model.dtype=bf16", "model.dtype=bf16", "did you mean bfloat16?"),
    ("eval", "dtype=half", "dtype=half", "expected auto, float32, bfloat16"),
    ("rl", "lr_scheduler.scheduler=cos", "lr_scheduler.scheduler=cos", "expected constant, linear, cosine"),
    ("rl", "optimizer.name=adam", "optimizer.name=adam", "did you mean adamw?"),
    ("rl", "reward.kind=maths", "reward.kind=maths", "did you mean math?"),
    ("rl", "reward.function=my_reward", "reward.function=my_reward", "expected my_module:my_function"),
    ("eval", "dataset.data_type=mat", "dataset.data_type=mat", "did you mean math?"),
    ("rl", "experiment.trackers=[wandbb]", "experiment.trackers=wandbb", "did you mean wandb?"),
    # ranges
    ("rl", "training.upper_p=1.5", "training.upper_p=1.5", "must be between 0.01 and 1"),
    ("rl", "training.eps=-0.1", "training.eps=-0.1", "must be between 0 and 1"),
    ("rl", "training.beta=.nan", "training.beta=nan", "must be at least 0"),
    ("rl", "rollout.num_task_per_step=0", "rollout.num_task_per_step=0", "must be at least 1"),
    ("rl", "evaluation.top_p=[0.9,1.1]", "evaluation.top_p=1.1", "must be between 0 and 1"),
    ("rl", "evaluation.top_k=-1", "evaluation.top_k=-1", "must be at least 0"),
    ("sft", "training.batch_size=0", "training.batch_size=0", "must be at least 1"),
    # combinations
    ("rl", "training.lower_p=0.95", "training.lower_p=0.95", "above training.upper_p=0.9"),
    (
        "rl",
        "rollout={denoising_steps_per_block: 8, block_size: 4}",
        "rollout.denoising_steps_per_block=8",
        "rollout.block_size=4",
    ),
    ("eval", "rollout.block_size=[4,2]", "rollout.denoising_steps_per_block=4", "rollout.block_size=2"),
    ("rl", "training.updates_per_step=9", "training.updates_per_step=9", "rollout.num_task_per_step=4"),
    ("rl", "reward.truncated_margin=2000", "reward.truncated_margin=2000", "rollout.max_token=2000"),
    ("rl", "training.keep_accuracy=[0.8,0.2]", "training.keep_accuracy=[0.8, 0.2]", "ascending"),
    ("rl", "training.keep_accuracy=[0.8]", "training.keep_accuracy=[0.8]", "two ascending numbers"),
    ("rl", "rollout.num_response_per_task=1", "rollout.num_response_per_task=1", "at least 2"),
    ("rl", "rollout.top_k=[0,1]", "rollout.top_k=[0, 1]", "lists belong to evaluation"),
    ("rl", "evaluation.top_k=[]", "evaluation.top_k has 0", "same number of entries"),
    ("rl", "model.pretrained_model=tiny", "model.pretrained_model=tiny", "model.made_by"),
    # required
    ("rl", "model.pretrained_model=", "model.pretrained_model is empty", "on the command line"),
    ("rl", "dataset.train_dataset=", "dataset.train_dataset is empty", "on the command line"),
    ("eval", "dataset.eval_dataset=", "dataset.eval_dataset is empty", "on the command line"),
    ("sft", "dataset.optimization_data=", "dataset.optimization_data is empty", "on the command line"),
    # arguments
    ("rl", "--training.seed=1", "--training.seed=1", "as in training.seed=1"),
    ("rl", "training.seed", "training.seed", "arguments are key=value"),
    ("rl", "evaluation.top_k=[0,1", "evaluation.top_k=[0,1", "not a YAML value"),
    ("rl", "training.seed=${rollout.nothing}", "training.seed=${rollout.nothing}", "not found"),
    ("rl", "training.seed=${model.pretrained_model}", "training.seed=${model.pretrained_model}", "some/model"),
    ("rl", "training.seed=${training.seed}", "", "ecursi"),
]


@pytest.mark.parametrize(("job", "argument", "told", "way_out"), MISTAKES, ids=[f"{m[0]}-{m[1]}" for m in MISTAKES])
def test_mistakes_are_one_line(load, job, argument, told, way_out):
    with pytest.raises(UserError) as caught:
        load(job, argument)
    message = str(caught.value)
    assert told in message and way_out in message and "\n" not in message and len(message) < 400


def test_two_lists_of_unequal_length(load):
    with pytest.raises(UserError, match=r"evaluation.temperature has 3, evaluation.top_k has 2"):
        load("rl", "evaluation.top_k=[0,1]", "evaluation.temperature=[0,1,1]")


def test_detach_is_for_one_update(load):
    assert load("rl", "training.old_logp=detach").training.old_logp == "detach"
    with pytest.raises(UserError, match=r"training.old_logp=detach .* training.updates_per_step=2"):
        load("rl", "training.old_logp=detach", "training.updates_per_step=2")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {a: 1\nb: [\n", "mine.yaml line 2: broken YAML"),
        ("training:\n  seed: 1\n  seed: 2\n", "mine.yaml line 3: broken YAML: found duplicate key seed"),
        ("- a\n", "mine.yaml: broken YAML: expected keys, found a list"),
        ("just words\n", "unknown key just words=null in"),
        ("model: {pretrained_model: [a]}\n", "model.pretrained_model=['a']: expected text"),
        (RL + "wandbb: {entity: me}\n", "unknown key wandbb.entity=me in"),
    ],
)
def test_broken_files(load, text, told):
    with pytest.raises(UserError) as caught:
        load("rl", text=text)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_missing_config():
    with pytest.raises(UserError, match=r"config= is missing; for rl.py choose one of: .*configs/rl_llada.yaml"):
        load_config("rl", ["training.seed=1"])
    with pytest.raises(
        UserError, match=r"config=configs/rl_tradoo.yaml: no such file; .* config=configs/rl_trado.yaml\?"
    ):
        load_config("rl", ["config=configs/rl_tradoo.yaml"])
    with pytest.raises(UserError, match=r"did you mean config=configs/rl_trado.yaml\?"):
        load_config("rl", ["config=rl_trado"])


def test_config_of_another_job():
    with pytest.raises(UserError, match=r"trado_eval.yaml is a config for eval.py, not for rl.py"):
        load_config("rl", ["config=configs/trado_eval.yaml"])
    with pytest.raises(UserError, match=r"is a config for rl.py, not for train/sft_<family>.py"):
        load_config("sft", ["config=configs/rl_sdar.yaml"])


# What ships --------------------------------------------------------------------------------------------------------

SHIPPED = shipped("configs", "*.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_parse(path, capsys):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    job = infer_job(read_layers(path))
    cfg = load_config(job, [f"config={path}"])
    assert cfg.experiment.project == path.stem or "project:" in text
    assert capsys.readouterr().err == "", "a shipped config uses today's keys"
    if job in ("rl", "sft") and "tiny" not in path.stem:  # 4B to 8B: a micro-batch's activations exceed any GPU
        assert cfg.training.gradient_checkpointing_enable


@pytest.mark.parametrize("job", ["rl", "eval", "sft"])
def test_dump_is_read_back(load, job):
    cfg = load(job, "experiment.project=again")
    assert load(job, text=dump_config(cfg)) == cfg
    written = yaml.safe_load(dump_config(cfg))
    assert infer_job([("a dump", flatten(written))]) == job


def test_a_job_without_a_config_file():
    cfg = load_config("generate", ["model=M", "prompt=4+2", "temperature=0"])
    assert (cfg.model, cfg.prompt, cfg.temperature) == ("M", "4+2", 0.0)
    with pytest.raises(UserError, match="model is empty: set it as model=…"):
        load_config("generate", ["prompt=4+2"])


def test_every_default_is_allowed():
    for job in JOBS.values():
        for key, limits in keys_of(job.config).items():
            choices, value = limits.choices, limits.default
            assert not choices or value is None or set(value if isinstance(value, list) else [value]) <= {*choices}, key


def test_key_table_is_current():
    readme = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    assert readme == key_tables(), "run: python -m common.config --keys > configs/README.md"


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        parse_or_help("rl", ["config=nowhere", "--help"], "Reinforcement learning.")
    told = capsys.readouterr().out
    assert left.value.code == 0 and "Reinforcement learning." in told and "configs/README.md" in told
    assert "configs/rl_trado.yaml" in told and "trado_eval" not in told
    assert "configs/sft_trado.yaml" in usage("sft", "") and "configs/trado_eval.yaml" in usage("eval", "")


def test_configs_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/rl_trado.yaml").is_file()


def test_command_line():
    good = python("-m", "common.config", "configs/trado_eval.yaml", "rollout.top_k=[0,1]")
    assert good.returncode == 0 and yaml.safe_load(good.stdout)["rollout"]["top_k"] == [0, 1]
    bad = python("-m", "common.config", "configs/rl_trado.yaml", "training.sed=1")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == "error: unknown key training.sed=1 in the command line; did you mean training.seed?\n"


ENTRY = [*(f"{name}.py" for name in ("eval", "generate", "multinode_eval", "multinode_rl", "rl", "serve"))]
ENTRY += [*(f"train/sft_{family}.py" for family in ("sdar", "trado", "sdar_moe", "dream", "llada", "mmada", "llada2"))]
ENTRY += ["sample/get_trace_viewer.py", "reward/__main__.py", "common/config.py", "common/doctor.py"]
HELP = """
import atexit, runpy, sys
atexit.register(lambda: print([name for name in ("torch", "transformers", "ray") if name in sys.modules]))
sys.path.insert(0, "")
sys.argv[1:] = ["--help"]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script", ENTRY)
def test_help_imports_nothing_heavy(script):
    """Every entry script tells its usage in well under a second."""
    done = python("-c", HELP.format(script=script))
    *told, heavy = done.stdout.splitlines()
    assert done.returncode == 0 and heavy == "[]" and "config" in "".join(told)


def test_importing_generate_registers_the_families():
    """What generate.py --help does without is there for those who import it."""
    code = "import generate, transformers; print(transformers.AutoConfig.for_model('sdar').model_type)"
    assert python("-c", code).stdout.split()[-1] == "sdar"


REFUSED_LISTS = [
    ("generate", "temperature=[0.5,1]", "temperature=[0.5, 1.0]: generate.py samples under one setting"),
    ("serve", "remasking_strategy=[sequential]", "remasking_strategy=['sequential']: serve.py samples under one"),
    ("trace", "block_size=[4,8]", "block_size=[4, 8]: sample/get_trace_viewer.py samples under one setting"),
]


@pytest.mark.parametrize(("job", "argument", "told"), REFUSED_LISTS)
def test_lists_of_settings_belong_to_evaluation(job, argument, told):
    with pytest.raises(UserError) as caught:
        load_config(job, ["model=M", argument])
    assert str(caught.value).startswith(told) and str(caught.value).endswith("; lists belong to evaluation")


SCHEDULES = [
    ("{40: 8}", "rollout.block_size={40: 8}: the steps of a schedule ascend from 0, as in {0: 4, 40: 8}"),
    ("{0: 4, 9: 8, 5: 16}", "rollout.block_size={0: 4, 9: 8, 5: 16}: the steps of a schedule ascend from 0"),
    ("{0: 4, 5: 0}", "rollout.block_size={0: 4, 5: 0}: must be at least 1"),
    (
        "{0: 4, 5: many}",
        "rollout.block_size={0: 4, 5: 'many'}: expected a whole number, or a schedule as {0: 4, 40: 8}",
    ),
    ("{0: 4, 5.5: 8}", "rollout.block_size={0: 4, 5.5: 8}: expected a whole number, or a schedule as {0: 4, 40: 8}"),
    ("{first: 4}", "unknown key rollout.block_size.first=4 in the command line; did you mean rollout.block_size?"),
    ("{0: 4, 50: 8}", "rollout.block_size={0: 4, 50: 8}: experiment.total_step=50 ends before the size of 50 is drawn"),
    (
        "{0: 4, 5: 2} rollout.denoising_steps_per_block=4",
        "rollout.denoising_steps_per_block=4 is more than rollout.blo",
    ),
    ("{0: 4, 5: 8} rollout.denoising_steps_per_block={0: 2, 6: 4}", "rollout.denoising_steps_per_block={0: 2, 6: 4} w"),
    (
        "4 rollout.denoising_steps_per_block={0: 2, 6: 4}",
        "rollout.denoising_steps_per_block={0: 2, 6: 4} with rollout.b",
    ),
    (
        "{0: 4, 5: 8} model.model_base=dream",
        "rollout.block_size={0: 4, 5: 8} is of block attention, which model.model_b",
    ),
    ("4 training.seed={0: 1}", "training.seed={0: 1}: expected a whole number"),
]


@pytest.mark.parametrize(("written", "told"), SCHEDULES, ids=[one[0] for one in SCHEDULES])
def test_a_schedule_that_cannot_be_is_refused(load, written, told):
    with pytest.raises(UserError) as caught:
        load("rl", *re.split(r" (?=[a-z]+\.)", f"rollout.block_size={written}"))
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_a_schedule_holds_for_what_follows_it(load, tmp_path, capsys):
    """For the steps of a block and for evaluations, unless these are set; it is read back as it was written."""
    config = load("rl", "rollout.block_size={0: 4, 5: 8}", "evaluation.top_k=[0,1]")
    assert (
        "rollout.block_size={0: 4, 5: 8} → rollout.denoising_steps_per_block, evaluation.b" in capsys.readouterr().err
    )
    sizes = [(one.block_size, one.denoising_steps_per_block) for one in map(config.rollout.at_step, (1, 5, 6, 60))]
    assert sizes == [(4, 4), (4, 4), (8, 8), (8, 8)]
    assert [one.block_size for one in settings_of(config.evaluation.at_step(6))] == [8, 8]
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config("rl", [f"config={tmp_path / 'config.yaml'}"]) == config
    config = load("rl", "recipe=just_grpo", "rollout.block_size={0: 4, 5: 8}", "evaluation.block_size=[4,8]")
    assert config.rollout.at_step(6).denoising_steps_per_block == 8 and config.evaluation.block_size == [4, 8]
    with pytest.raises(UserError, match=r"^rollout.block_size=\{0: 4\}: expected a whole number, or a list of such$"):
        load("eval", "rollout.block_size={0: 4}")


IDLE = [
    (
        "rl",
        "training.value_reward=zscore",
        "training.value_reward=zscore is of a value model, and there is none; set m",
    ),
    (
        "rl",
        "training.process_placement=chunk_end reward.judge.reward_chunk_length=8",
        "training.process_placement=chunk_end is of a value model, and th",
    ),
    (
        "rl",
        "training.shrink=2 training.method=coupled",
        "training.shrink=2 with training.method=coupled: its views hav",
    ),
    ("sft", "training.shrink=2", "training.shrink=2 with training.method=semi-ar: its views have no trace"),
    (
        "rl",
        "training.term=sequence training.loss_norm=step",
        "training.loss_norm=step with training.term=sequence: a r",
    ),
    ("rl", "training.kl_norm=view_sum training.kl_reference=none", "training.kl_norm=view_sum with training.kl_refere"),
    ("rl", "reward.code_reward=share", "reward.code_reward=share is of programs, but dataset.data_type=math gives"),
    ("eval", "reward.code_reward=share reward.kind=option", "reward.code_reward=share is of programs, but reward.kind"),
    (
        "rl",
        "reward.code_reward=share dataset.data_type=code reward.function=m:f",
        "reward.code_reward=share is of prog",
    ),
    ("rl", "model.model_base=llada recipe=ebpo", "training.method=stratified is of block attention, which model.model"),
    (
        "sft",
        "recipe=dapo",
        "recipe=dapo in the command line: train/sft_<family>.py does not read it, only rl.py; leave i",
    ),
    ("eval", "recipe=dapo", "recipe=dapo in the command line: eval.py does not read it, only rl.py; leave it out"),
]


@pytest.mark.parametrize(("job", "written", "told"), IDLE, ids=[f"{one[0]} {one[1]}" for one in IDLE])
def test_what_would_do_nothing_is_refused(load, job, written, told):
    with pytest.raises(UserError) as caught:
        load(job, *written.split())
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)


def test_where_these_keys_do_something_they_are_taken(load):
    load("rl", "training.value_reward=zscore", "model.value_base_model=V")
    load("rl", "training.shrink=2", "training.method=my_module:my_views")
    load("rl", "training.term=sequence", "training.loss_norm=length")
    load("rl", "reward.code_reward=share", "dataset.data_type=code")
    config = load_config("reward", ["data=d", "responses=r", "out=o", "code_reward=share"])
    assert config.code_reward == "share"


def test_a_recipe_in_the_file_of_another_job_is_refused(load):
    for job in ("sft", "eval"):
        with pytest.raises(UserError, match=r"^recipe=dapo in .*mine\.yaml: .* does not read it, only rl\.py"):
            load(job, text=f"{CONTENT[job]}\nrecipe: dapo\n")


def test_a_reader_that_is_gone_ends_a_program_without_a_word():
    """As `| head` goes; at once, and where what was printed is first written at the end."""
    for unbuffered in ("", "1"):
        code, environment = "print('a' * 100)", os.environ | {"PYTHONUNBUFFERED": unbuffered}
        program = f"from common.errors import one_line_errors\n@one_line_errors\ndef main():\n {code}\nmain()"
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, b"")


def test_the_reward_job_takes_its_keys_with_and_without_their_section():
    files = ["data=d", "responses=r", "out=o"]
    for prefix in ("", "reward."):
        config = load_config("reward", [*files, f"{prefix}kind=code", f"{prefix}judge.retries=2"])
        assert (config.kind, config.judge.retries, config.workers) == ("code", 2, None)
    with pytest.raises(UserError, match="out is empty: set it as out=…"):
        load_config("reward", files[:2])
    with pytest.raises(UserError, match=r"truncated_is_wrong=true"):
        load_config("reward", [*files, "truncated_is_wrong=true"])
