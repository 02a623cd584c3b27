"""Older configs: the original's YAML files load, keep their meaning, and say what became of their keys."""

import json
from pathlib import Path

import pytest
import yaml

from common.config import load_config, settings_of
from common.errors import UserError
from common.jobs import RLConfig
from common.schema import ATTENTION
from models.family import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
RL = """model: {pretrained_model: some/model}
dataset: {train_dataset: tasks}
rollout: {num_task_per_step: 4, num_response_per_task: 2}
training: {method: TraceRL}
"""


@pytest.fixture
def load(tmp_path):
    """load(job, *arguments, text=…): the config of a YAML with that text."""

    def run(job, *arguments, text=RL):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(job, [f"config={path}", *arguments])

    return run


SAMPLING = {
    "tensor_parallel_size": 1,
    "max_active": 256,
    "temperature": 1.0,
    "max_token": 2000,
    "block_size": 4,
    "denoising_steps_per_block": 4,
    "top_p": 1.0,
    "top_k": 0,
    "remasking_strategy": "low_confidence_dynamic",
    "dynamic_threshold": 0.9,
    "start_with_think": False,
}
TRAINING = {
    "gradient_checkpointing_enable": True,
    "mixed_precision": "bf16",
    "enable_tf32": True,
    "seed": 10086,
    "num_train_epochs": 1,
    "lower_p": 0.1,
    "upper_p": 0.9,
    "block_size": 4,
    "shrink": 1,
    "post_num": 0,
    "max_gen_length": 2000,
    "max_prompt_len": 784,
    "batch_size_lm": 1,
}
ADAMW = {"scale_lr": False, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "epsilon": "1e-8"}
SHARED = {
    "wandb": {"entity": None, "resume": "auto"},
    "model": {"pretrained_model": "/abs/path/of/model", "optimized_name": "optimized"},
    "lr_scheduler": {
        "scheduler": "cosine",
        "params": {"learning_rate": "${optimizer.params.learning_rate}", "warmup_steps": 0, "min_lr_scale": 1.0},
    },
}
ORIGINAL = {
    "rl": SHARED
    | {
        "system": {"HF_HOME": "/abs/path/of/HF_HOME", "env_name": "env_name"},
        "experiment": {
            "project": "rl_{family}",
            "function": "train",
            "start_from_scratch": True,
            "total_step": 80,
            "save_every": 10,
            "eval_every": 10,
            "current_epoch": 1,
            "deepspeed_file": "1_node_8_gpus_deepspeed_zero3",
            "num_node": 1,
            "node_index": 0,
        },
        "model": SHARED["model"] | {"model_base": "{family}"},
        "dataset": {"train_dataset": "dataset_name", "optimization_data": "rl_data", "data_type": "math"},
        "rollout": SAMPLING | {"num_task_per_step": 64, "num_response_per_task": 16},
        "execute": {"num_chunk": 128},
        "training": TRAINING
        | {
            "gradient_accumulation_steps": 32,
            "max_grad_norm": 1.0,
            "method": "TraceRL",
            "eps": 0.2,
            "beta": 0.01,
            "use_kl_estimator_k3": True,
        },
        "optimizer": {"name": "adamw", "params": ADAMW | {"learning_rate": "1e-6"}},
        "evaluation": SAMPLING
        | {
            "eval_dataset": "MATH500",
            "data_type": "math",
            "num_response_per_task": 3,
            "top_k": [0, 1],
            "remasking_strategy": ["low_confidence_dynamic", "low_confidence_static"],
        },
    },
    "sft": SHARED
    | {
        "experiment": {"project": "sft_{family}", "num_node": 1},
        "dataset": {"optimization_data": "dataset_name"},
        "training": TRAINING | {"gradient_accumulation_steps": 16, "max_grad_norm": 1, "method": "semi-ar"},
        "optimizer": {"name": "adamw", "params": ADAMW | {"learning_rate": "1e-5"}},
    },
    "eval": {
        "experiment": {"project": "{family}_eval", "num_node": 1, "node_index": 0},
        "model": "/abs/path/of/model",
        "model_base": "{family}",
        "dataset": {"eval_dataset": "MATH500", "data_type": "math"},
        "execute": {"num_chunk": 128},
        "rollout": SAMPLING | {"num_response_per_task": 3, "output_unmasking_history": True},
    },
}


def with_value(process_reward):
    """The original's rl_{family}_with_value.yaml, or ..._process_reward_rlhf_with_value.yaml."""
    rl = ORIGINAL["rl"]
    random_views = ("lower_p", "upper_p")
    rates = {"policy_learning_rate": "1e-6", "value_learning_rate": "5e-6"}
    schedule = rl["lr_scheduler"]["params"] | {"learning_rate": "${optimizer.params.policy_learning_rate}"}
    result = rl | {
        "experiment": rl["experiment"] | {"train_value_every": 1, "deepspeed_file": "1_node_4_gpus_deepspeed_zero3"},
        "model": rl["model"] | {"value_base_model": "/abs/path/of/value", "optimized_value_name": "optimized_value"},
        "training": {key: one for key, one in rl["training"].items() if key not in random_views}
        | {"gam": 1.0, "lam": 1.0},
        "optimizer": {"name": "adamw", "params": ADAMW | rates},
        "lr_scheduler": rl["lr_scheduler"] | {"params": schedule},
    }
    if process_reward:
        judge = {"reward_chunk_length": 200, "k_sample": 3, "max_model_len": 15000, "max_generation_token": 10000}
        result["experiment"] |= {"total_step": 100, "save_every": 30, "eval_every": 5}
        result["model"] |= {"process_reward_model": "/abs/path/of/reward/model"}
        result["rollout"] = rl["rollout"] | {"num_task_per_step": 32, "reward_model": judge | {"temperature": 0.6}}
        result["training"] |= {"gam": 0.99, "gradient_accumulation_steps": 16}
    return result


def load_original(load, job, *arguments, family="trado", content=None):
    """The original's file of this job, loaded."""
    return load(job, *arguments, text=yaml.safe_dump(content or ORIGINAL[job]).replace("{family}", family))


@pytest.mark.parametrize("family", ["trado", "sdar"])
@pytest.mark.parametrize("job", ["rl", "sft", "eval"])
def test_original_files_load(load, job, family):
    cfg = load_original(load, job, family=family)
    assert family in cfg.experiment.project


def test_original_files_keep_their_meaning(load, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    rl = load_original(load, "rl")
    told = capsys.readouterr().err
    assert rl.optimizer.params.learning_rate == 1e-6 and rl.model.dtype == "bfloat16"
    assert rl.training.updates_per_step == 16  # 1024 responses × 4 rows / (32 × 8 rows an update)
    assert "training.updates_per_step=16" in told and "training.mixed_precision=bf16 → model.dtype=bfloat16" in told
    idle = [line for line in told.splitlines() if "without effect" in line]
    assert len(idle) == 1 and told.count("\n") == 4
    for key in ("system.*", "wandb.*", "execute.num_chunk", "experiment.function", "experiment.current_epoch"):
        assert key in idle[0]
    for key in ("training.num_train_epochs", "dataset.optimization_data", "optimizer.params.scale_lr"):
        assert key in idle[0]
    assert "as the original's code: training.loss_norm=length" in told
    sft = load_original(load, "sft")
    assert sft.training.batch_size == 128 and sft.training.num_train_epochs == 1 and sft.training.block_size == 4
    assert "num_train_epochs" not in capsys.readouterr().err


def test_renamed_keys(load, capsys):
    cfg = load("rl", "training.max_gen_length=96", "training.block_size=8", "training.mixed_precision=no")
    assert (cfg.rollout.max_token, cfg.rollout.block_size, cfg.model.dtype) == (96, 8, "float32")
    assert "training.max_gen_length=96 → rollout.max_token=96" in capsys.readouterr().err
    assert load("rl", "optimizer.params.policy_learning_rate=2e-6").optimizer.params.learning_rate == 2e-6
    cfg = load("rl", "training.block_size=8", "rollout.block_size=4")
    assert cfg.rollout.block_size == 4
    assert "training.block_size=8 (rollout.block_size=4 counts)" in capsys.readouterr().err
    load("rl", "training.max_gen_length=${rollout.max_token}")
    with pytest.raises(UserError, match=r"training.mixed_precision=fp16: not supported; set model.dtype to"):
        load("rl", "training.mixed_precision=fp16")


def test_size_of_an_update_from_older_keys(load):
    assert load("rl", "training.gradient_accumulation_steps=16").training.updates_per_step == 2  # 8 × 4 / 16
    assert load("rl", "training.batch_size_lm=1000").training.updates_per_step == 1
    both = ["training.batch_size_lm=1", "training.updates_per_step=3"]
    assert load("rl", *both).training.updates_per_step == 3
    newer = RL.replace("TraceRL", "TraceRL, updates_per_step: 4")
    assert load("rl", "training.gradient_accumulation_steps=16", text=newer).training.updates_per_step == 2
    older = RL.replace("TraceRL", "TraceRL, gradient_accumulation_steps: 16")
    assert load("rl", "training.updates_per_step=4", text=older).training.updates_per_step == 4
    with pytest.raises(UserError, match=r"training.batch_size_lm=0: expected a whole number, at least 1"):
        load("rl", "training.batch_size_lm=0")


FULL = {"steps": 64, "max_gen_length": 96, "block_size": 32, "remasking_strategy": "low_confidence_static"}


@pytest.mark.parametrize(
    ("family", "rollout", "training", "rows"),
    [
        ("sdar", {}, {}, 4),  # steps of a block
        ("sdar", {"block_size": 8, "denoising_steps_per_block": 2}, {}, 2),
        ("sdar", {"block_size": 8, "denoising_steps_per_block": 8}, {"shrink": 3}, 3),
        ("sdar", {"block_size": 8, "remasking_strategy": "entropy_bounded"}, {}, 8),
        ("trado", {}, {"shrink": 8}, 1),
        ("sdar", {}, {"method": "random_masking", "mask_times_per_sample": 5}, 5),
        ("sdar", {}, {"method": "coupled", "mask_times_per_sample": 5, "shrink": 4}, 10),
        ("dream", FULL, {}, 64),  # steps of the response
        ("llada", FULL, {"shrink": 7}, 10),
        ("mmada", FULL | {"steps": 1000}, {"shrink": 8}, 12),  # no more steps than tokens
        ("dream", FULL, {"method": "random_masking", "mask_times_per_sample": 35, "shrink": 8}, 35),
        ("llada", FULL, {"method": "coupled", "mask_times_per_sample": 35}, 70),
        ("my_families:FULL", FULL, {"shrink": 8}, 8),
        ("my_families:BLOCK", {}, {}, 4),
        ("sdar", {}, {"method": "my_views:mine"}, 1),
    ],
)
def test_rows_of_a_response_as_the_original_made_them(load, family, rollout, training, rows):
    """Of 5 × 20 responses; an update of 3 × 2 rows on one device, or of twice as many on two."""
    content = yaml.safe_load(RL)
    content["model"]["model_base"] = family
    content["rollout"] = {"num_task_per_step": 5, "num_response_per_task": 20} | rollout
    content["training"] |= {"gradient_accumulation_steps": 3, "batch_size_lm": 2} | training
    for file, devices in ((None, 1), ("1_node_2_cpus_deepspeed_zero3", 2), ("4_node_8_gpus_deepspeed_zero3", 32)):
        content["experiment"] = {"deepspeed_file": file}
        found = load("rl", text=yaml.safe_dump(content)).training
        assert found.updates_per_step == min(max(round(100 * rows / (6 * devices)), 1), 100)
        assert found.mask_times_per_sample == training.get("mask_times_per_sample", 1)


def test_families_whose_rows_are_steps_of_the_response():
    ours = [one for one in FAMILIES.values() if one.model_class.__module__.startswith("models.")]
    for attention, names in ATTENTION.items():
        assert {one.name for one in ours if one.attention == attention} == set(names) and len(names) > 2


def test_the_devices_of_an_update_are_those_that_were_launched(load, capsys, monkeypatch):
    """Before the launch as many as the file asks for; in a rank as many as there are, whatever the file says."""
    keys = ["training.gradient_accumulation_steps=2", "experiment.deepspeed_file=1_node_4_gpus_deepspeed_zero3"]
    assert load("rl", *keys).training.updates_per_step == 4  # 8 × 4 / (2 × 4)
    assert "× 4 devices = 8 rows an update, 8 responses × 4 rows a step" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load("rl", *keys).training.updates_per_step == 8
    monkeypatch.setenv("WORLD_SIZE", "1")
    load("rl", keys[0])
    assert "× 1 device = 2 rows" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match=r"experiment.deepspeed_file=1_node_5_gpus: no such file .*did you mean"):
        load("rl", keys[0], "experiment.deepspeed_file=1_node_5_gpus")


@pytest.mark.parametrize(
    ("method", "copies", "size"), [("semi-ar", 35, 4), ("random_masking", 3, 43), ("trace", 35, 128), ("ar", 2, 128)]
)
def test_noised_copies_of_a_sample_count_as_the_original_s_rows(load, monkeypatch, method, copies, size):
    monkeypatch.setenv("WORLD_SIZE", "32")
    text = "model: {pretrained_model: m, model_base: dream}\ndataset: {optimization_data: d}\n"
    keys = ["training.gradient_accumulation_steps=2", "training.batch_size_lm=2", f"training.method={method}"]
    cfg = load("sft", *keys, f"training.mask_times_per_sample={copies}", text=text)
    assert (cfg.training.batch_size, cfg.training.mask_times_per_sample) == (size, copies)


def test_only_the_first_device_reports(load, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load("rl", "execute.num_chunk=1")
    assert capsys.readouterr().err == ""


def test_original_names_carry_the_published_numbers(load):
    for family in ("trado", "sdar"):
        ours = load_config("rl", [f"config={ROOT}/configs/rl_{family}.yaml", "experiment.project=x"])
        cfg = load_original(load, "rl", "training.updates_per_step=16", family=family)
        assert ours.training.loss_norm == "length"
        for section in ("rollout", "optimizer", "lr_scheduler"):
            assert getattr(ours, section) == getattr(cfg, section)
        assert vars(ours.evaluation) == vars(cfg.evaluation) | {"eval_dataset": "", "data_type": None}
        assert [one.top_k for one in settings_of(ours.evaluation)] == [0, 1]
        assert vars(ours.training) == vars(cfg.training)


@pytest.mark.parametrize("family", ["trado", "sdar"])
@pytest.mark.parametrize("process_reward", [False, True], ids=["outcome", "process"])
def test_original_files_with_a_value_model(load, capsys, monkeypatch, family, process_reward):
    """They load, keep their meaning, and are what the shipped configs of their names say."""
    monkeypatch.setenv("WORLD_SIZE", "8" if process_reward else "4")
    cfg = load_original(load, "rl", family=family, content=with_value(process_reward))
    assert cfg.model.value_base_model == "/abs/path/of/value" and cfg.model.optimized_value_name == "optimized_value"
    assert cfg.optimizer.params.learning_rate == 1e-6 and cfg.optimizer.params.value_learning_rate == 5e-6
    assert (cfg.training.gam, cfg.training.lam) == (0.99 if process_reward else 1.0, 1.0)
    assert (cfg.training.value_reward, cfg.training.keep_accuracy) == ("zscore", [0.2, 0.8])
    assert cfg.training.process_placement == ("chunk_end" if process_reward else "all")
    assert cfg.training.updates_per_step == (16 if process_reward else 32)
    assert "training.value_reward=zscore" in capsys.readouterr().err
    asked = load_original(load, "rl", "training.keep_accuracy=[0.1,0.9]", content=with_value(process_reward))
    assert asked.training.keep_accuracy == [0.1, 0.9]

    name = f"rl_{family}{'_process_reward_rlhf' * process_reward}_with_value"
    ours = load_config("rl", [f"config={ROOT}/configs/{name}.yaml", "experiment.project=x"])
    assert ours.model.value_base_model == ours.model.pretrained_model
    assert vars(ours.training) == vars(cfg.training)
    for section in ("rollout", "optimizer", "lr_scheduler"):
        assert getattr(ours, section) == getattr(cfg, section)
    judge = vars(cfg.reward.judge)
    if process_reward:
        assert judge["model"] == "/abs/path/of/reward/model" and judge["reward_chunk_length"] == 200
        judge = judge | {"model": "process_reward_model", "base_url": "http://127.0.0.1:8000/v1"}
    assert vars(ours.reward.judge) == judge


def test_groups_to_keep_follow_what_is_learned(load, capsys):
    """Raw rewards of a value model are not compared in groups; shares of tests are, of programs that fail too."""
    raw = load("rl", "model.value_base_model=some/model").training
    assert (raw.value_reward, raw.keep_accuracy) == ("raw", None)
    share = load("rl", "reward.code_reward=share", "dataset.data_type=code").training
    assert (share.keep_accuracy, share.drop_equal) == (None, True)
    assert "reward.code_reward=share → training.keep_accuracy=null" in capsys.readouterr().err
    kept = load("rl", "reward.code_reward=share", "dataset.data_type=code", "training.keep_accuracy=[0.1,0.9]").training
    assert (kept.keep_accuracy, kept.drop_equal) == ([0.1, 0.9], False)


def test_another_term_than_the_originals_takes_no_kl_norm_of_its_own(load):
    """What is derived from a file of the original does not contradict what its user sets."""
    training = load_original(load, "rl", "training.term=sequence", family="llada").training
    assert (training.term, training.kl_norm, training.loss_norm) == ("sequence", None, "token")
    assert load_original(load, "rl", family="llada").training.kl_norm == "view_sum"
    assert load_original(load, "rl", "training.kl_reference=none", family="llada").training.kl_norm is None
    keys = ("reward.kind=general", "dataset.data_type=code")
    assert load_original(load, "rl", *keys, family="llada").reward.code_reward == "all"


def test_steps_that_the_original_does_not_merge_are_said(load, capsys):
    keys = ("training.method=coupled", "training.shrink=4")
    assert load_original(load, "rl", *keys, family="llada").training.shrink == 1
    assert "training.shrink=4 (training.method=coupled has no trace)" in capsys.readouterr().err


def test_norms_and_placements_that_fit_nothing_are_refused(load):
    with pytest.raises(UserError, match=r"training.kl_norm=view_sum with training.term=sequence: .*=null"):
        load("rl", "training.kl_norm=view_sum", "training.term=sequence")
    with pytest.raises(UserError, match=r"training.process_placement=chunk_end: .*reward.judge.reward_chunk_length"):
        load("rl", "training.process_placement=chunk_end")
    one = ("training.value_reward=zscore", "rollout.num_response_per_task=1", "model.value_base_model=some/model")
    with pytest.raises(UserError, match=r"training.value_reward=zscore with rollout.num_response_per_task=1: .*at"):
        load("rl", *one)


def test_a_value_model_needs_traces_and_token_ratios(load):
    value = "model.value_base_model=some/model"
    with pytest.raises(UserError, match=r"value_base_model with training.method=coupled: .*training.method=TraceRL"):
        load("rl", value, "training.method=coupled")
    with pytest.raises(UserError, match=r"value_base_model with training.term=sequence: .*training.term=token"):
        load("rl", value, "training.ratio_level=sequence")
    with pytest.raises(UserError, match=r"training.tis_cap=2.0 with training.old_logp=engine: .*old_logp=auto"):
        load("rl", "training.tis_cap=2", "training.old_logp=engine")
    with pytest.raises(UserError, match=r"training.replay_routes with training.method=coupled: .*method=TraceRL"):
        load("rl", "training.replay_routes=True", "training.method=coupled")
    assert load("rl", value, "rollout.num_response_per_task=1").rollout.num_response_per_task == 1
    with pytest.raises(UserError, match=r"model.value_base_model=some/model .*sft_<family>.py does not read it"):
        load("sft", value, text="model: {pretrained_model: m}\ndataset: {optimization_data: d}\n")


def test_finetuning_configs_carry_the_published_numbers(load, monkeypatch):
    """Leaf and base together say what the original's files say on the GPUs that those are for."""
    block = ORIGINAL["sft"]
    full = {"gradient_checkpointing_enable": False, "gradient_accumulation_steps": 2, "batch_size_lm": 2}
    full |= {"block_size": 16, "max_gen_length": 1024, "mask_times_per_sample": 1, "method": "random_masking"}
    full = block | {"training": block["training"] | full}
    full["training"].pop("shrink")
    for family, content, devices in (("trado", block, 8), ("sdar", block, 8), ("llada", full, 32)):
        monkeypatch.setenv("WORLD_SIZE", str(devices))
        theirs = load("sft", f"model.model_base={family}", text=yaml.safe_dump(content).replace("{family}", family))
        ours = load_config("sft", [f"config={ROOT}/configs/sft_{family}.yaml"])
        assert theirs.training.batch_size == ours.training.batch_size == 128
        own = {"eval_every": ours.training.eval_every, "gradient_checkpointing_enable": True}  # memory, not the update
        assert vars(ours.training) == vars(theirs.training) | own, family
        assert (ours.optimizer, ours.lr_scheduler) == (theirs.optimizer, theirs.lr_scheduler)
    dream = load_config("sft", [f"config={ROOT}/configs/sft_dream.yaml"]).training
    assert (dream.method, dream.block_size, dream.max_gen_length, dream.post_num) == ("semi-ar", 16, 1024, 0)
    mmada = load_config("sft", [f"config={ROOT}/configs/sft_mmada.yaml"])
    assert vars(mmada.training) == vars(ours.training) and mmada.model.model_base == "mmada"
    long = load_config("sft", [f"config={ROOT}/configs/sft_trado_longcot.yaml"])
    assert long.training.max_gen_length == long.evaluation.max_token == 30_000 and long.evaluation.start_with_think


MOVING = (ROOT / "docs" / "moving.md").read_text(encoding="utf-8")
PUBLISHED = ROOT.parent / "shared" / "original_settings.json"
FILES = json.loads(PUBLISHED.read_text(encoding="utf-8"))["files"] if PUBLISHED.is_file() else {}
JOB_OF = {"sft": "sft", "eval": "eval", "rl": "rl"}  # by the word in the file's name


@pytest.mark.parametrize("name", FILES or [None])
def test_the_originals_own_files_load_and_ours_of_that_name_agree(name, tmp_path, capsys, monkeypatch):
    if name is None:
        pytest.skip("original_settings.json is not in shared/ beside the repository")
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # on as many devices as its deepspeed_file is for
    job = next(job for word, job in JOB_OF.items() if word in name)
    (tmp_path / name).write_text(yaml.safe_dump(FILES[name]), encoding="utf-8")
    theirs = load_config(job, [f"config={tmp_path / name}"])
    ours = load_config(job, [f"config={ROOT}/configs/{name}"])
    assert theirs.experiment.project == name.removesuffix(".yaml")
    if job == "sft":
        assert theirs.training.method == ours.training.method
        return
    sampling = ("max_token", "block_size", "temperature", "top_p", "top_k", "remasking_strategy", "dynamic_threshold")
    for key in (*sampling, "steps", "further_horizon", "start_with_think", "num_response_per_task"):
        assert getattr(theirs.rollout, key) == getattr(ours.rollout, key), key
    if job == "rl":
        for key in (
            "updates_per_step",
            "mask_times_per_sample",
            "method",
            "shrink",
            "eps",
            "beta",
            "gam",
            "lam",
            "post_num",
            "max_prompt_len",
        ):
            assert getattr(theirs.training, key) == getattr(ours.training, key), key
        assert theirs.rollout.num_task_per_step == ours.rollout.num_task_per_step


def objective_row(name: str, config: RLConfig) -> str:
    """The file's line of the table in docs/moving.md."""
    training = config.training
    rewards = "z-score of the share of tests" if config.reward.code_reward == "share" else "z-score"
    if config.model.value_base_model:
        by_chunk = training.process_placement == "chunk_end"
        rewards = f"value model, {'chunk_end' if by_chunk else training.value_reward.replace('zscore', 'z-score')}"
    cells = [
        f"`{name.removesuffix('.yaml')}`",
        training.method + (f", shrink {training.shrink}" if training.shrink > 1 else ""),
        training.term,
        training.loss_norm,
        training.kl_norm or "as the loss",
        rewards,
        "unequal" if training.drop_equal else training.keep_accuracy,
        training.updates_per_step,
    ]
    return f"| {' | '.join(map(str, cells))} |"


@pytest.mark.parametrize("name", [name for name in FILES if "rl_" in name] or [None])
def test_the_objective_of_each_file_is_the_documented_one(name, tmp_path, monkeypatch):
    if name is None:
        pytest.skip("original_settings.json is not in shared/ beside the repository")
    monkeypatch.setenv("WORLD_SIZE", "8")
    (tmp_path / name).write_text(yaml.safe_dump(FILES[name]), encoding="utf-8")
    theirs = load_config("rl", [f"config={tmp_path / name}"])
    assert objective_row(name, theirs) in MOVING.splitlines()
    ours = load_config("rl", [f"config={ROOT}/configs/{name}"])
    ours.training.updates_per_step = (
        theirs.training.updates_per_step
    )  # of ours on the devices that it was published for
    assert objective_row(name, ours) == objective_row(name, theirs)
    assert ours.reward.truncated_is_wrong == theirs.reward.truncated_is_wrong
    assert theirs.dataset.data_type == "code" or ours.reward.truncated_margin == theirs.reward.truncated_margin == 5
