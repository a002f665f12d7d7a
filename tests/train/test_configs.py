"""The shipped configurations of accelerate and DeepSpeed: each is run here or in another test."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import launch_ranks
from ranks import run_ranks
from test_launch import ROOT, config  # noqa: F401 - config is a fixture

from anon_dist.engines.zero import zero_config

ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_reads_it(path):
    assert path.read_text().startswith("# ")
    load_config_from_file(str(path))


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [
        *((name, "", 2) for name in ("fsdp2", "ddp", "deepspeed", "fsdp1")),
        *((name, "", 4) for name in ("hsdp", "fsdp2-tp")),
        *((name, "-multinode", 16) for name in ("fsdp2", "ddp", "deepspeed")),
    ],
)
def test_the_gpu_configuration_is_the_one_tested_on_cpus(name, machines, processes):
    gpu, cpus = (
        yaml.safe_load((ROOT / "configs" / "accelerate" / f"{n}{machines}.yaml").read_text())
        for n in (name, f"{name}-cpu")
    )
    assert gpu == {**cpus, "use_cpu": False, "num_processes": processes}


ENGINES = {
    "ddp-cpu": ("ddp", 2),
    "fsdp2-cpu": ("fsdp2", 2),
    "fsdp1-cpu": ("fsdp1", 2),
    "deepspeed-cpu": ("deepspeed", 2),
    "hsdp-cpu": ("hsdp", 4),
    "fsdp2-tp-cpu": ("fsdp2+tp2", 4),
}


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """A function: file → the variables that accelerate's launcher gives to each rank, for this configuration."""
    files = [f"{file}:{ranks}" for file, (_, ranks) in ENGINES.items()]
    out = launch_ranks(Path(__file__).with_name("environments.py"), 1, tmp_path_factory.mktemp("environments"), *files)

    def read(file):
        lines = [(out / file / str(rank)).read_text().split("\0")[:-1] for rank in range(ENGINES[file][1])]
        return [dict(line.split("=", 1) for line in of_rank) for of_rank in lines]

    return read


@pytest.mark.parametrize("file", ENGINES)
def test_what_accelerate_was_configured_for_is_what_runs(file, config, environments, tmp_path):  # noqa: F811
    """Some of them are launched as a whole too, in `test_launch.py` and in tests/multinode."""
    engine, ranks = ENGINES[file]
    options = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    options += ["--train.steps", "5", "--train.micro-batch", "2", "--checkpoint.every", "0", "--model.family", "llama"]
    well = run_ranks(ROOT / "launch" / "pretrain.py", environments(file), options, tmp_path / "log", seconds=200)
    output = (tmp_path / "log").read_text()
    assert well, output
    assert f"{engine} on {ranks} cpu ranks" in output
    assert "this run" in output


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.stem)
def test_deepspeed_configurations_are_run_by_a_case(path):
    cases = (ROOT / "tests" / "distributed" / "deepspeed_cases.py").read_text()
    waits = "_comment" in json.loads(path.read_text())  # for a GPU or a fast disk, and says so at its top
    assert waits == path.stem.endswith(("fp16", "nvme-params"))
    assert waits != (f'check_run("{path.stem}"' in cases)
    precision = {"bf16-optimizer": "bf16", "fp16": "fp16"}.get(path.stem.partition("-")[2], "fp32")
    filled = zero_config(path, micro_batch=2, accumulation=3, clip=None, precision=precision)
    assert (
        filled["train_micro_batch_size_per_gpu"],
        filled["gradient_accumulation_steps"],
        filled["gradient_clipping"],
    ) == (2, 3, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 7},
            "train_micro_batch_size_per_gpu is 7, and the training configuration says 2",
        ),
        ({"optimizer": {"type": "Adam"}}, "remove 'optimizer'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload the optimizer to cpu"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, and train.precision is fp32"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, and train.precision is fp32"),
    ],
)
def test_a_contradicting_deepspeed_configuration_is_refused(change, message, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(change))
    with pytest.raises(RuntimeError, match=message):
        zero_config(tmp_path / "c.json", micro_batch=2, accumulation=3, clip=1.0, precision="fp32")
