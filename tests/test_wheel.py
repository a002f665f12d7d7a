"""The package works from its wheel, outside of the clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_prepares_and_trains_outside_of_the_clone(texts, tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("anon_dist-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert (tmp_path / "site" / "anon_dist" / "configs" / "train" / "quickstart.yaml").is_file()
    assert (tmp_path / "site" / "anon_dist" / "py.typed").is_file()
    assert (tmp_path / "site" / "anon_dist" / "optim" / "backends" / "anon.c").is_file()
    assert (tmp_path / "site" / "anon_dist" / "bench" / "stream.c").is_file()
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def command(*args):
        done = subprocess.run(
            [sys.executable, "-m", "anon_dist.cli", *args],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command(
        "data",
        "prepare",
        "--source",
        str(texts),
        "--tokenizer",
        "bytes",
        "--out",
        "data/stdlib",
        "--val-fraction",
        "0.2",
    )
    small = [
        "--model.layers",
        "1",
        "--model.width",
        "32",
        "--model.heads",
        "2",
        "--train.steps",
        "3",
        "--schedule.warmup-steps",
        "1",
    ]
    engine = ["--train.engine", "single", "--log.trackers", "--eval.final-sequences", "8", "--log.every", "1"]
    output = command("train", "--config", "quickstart", *small, *engine)
    assert "this run" in output
    assert (work / "runs" / "quickstart" / "model" / "model.safetensors").is_file()
