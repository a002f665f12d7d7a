"""`anon-dist bench`: what it says it measured is what it measured."""

import inspect
import json
import os
import sys
import types

import pytest
import torch
from torch import nn

from anon_dist.bench.clock import Step, stream
from anon_dist.bench.optimizers import Contestant, UnavailableError, contestants, make, schedules, state_bytes, weights
from anon_dist.bench.paper import PaperLoop
from anon_dist.bench.peak import working_bytes
from anon_dist.bench.shape_lists import few_large, model_shapes, parameters
from anon_dist.cli import main
from anon_dist.optim.reference import ReferenceAnon

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", schedules())
def test_weights_are_what_counting_finds(name):
    settings, steps = schedules()[name], 3000
    reference = ReferenceAnon(torch.zeros(()), **settings)
    counted = {"plain": 0, "accumulating": 0, "refreshing": 0}
    for t in range(1, steps + 1):
        accumulates = reference.next_refresh - t < reference.window
        counted["refreshing" if t == reference.next_refresh else "accumulating" if accumulates else "plain"] += 1
        reference.step(torch.ones(()))
    assert weights(settings, steps) == {k: n / steps for k, n in counted.items() if n}
    assert all(counted.values()) or name != "rho = 2"


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.5, 1.0])
def test_the_papers_loop_is_the_papers(gamma):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(50))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "gamma": gamma, "weight_decay": 0.1}
    loop, reference = PaperLoop([p], **settings), ReferenceAnon(p, **settings)
    for _ in range(20):
        p.grad = torch.randn(50)
        loop.step()
        reference.step(p.grad)
    torch.testing.assert_close(p.detach().double(), reference.theta, rtol=1e-4, atol=1e-5)


def test_anon_with_its_matrices_turned():
    """Each kind of step with its renewal, of matrices; of vectors it says what it needs."""
    for name in ("Anon columns turned", "Anon both turned"):
        (contestant,) = (c for c in contestants() if c.name == name)
        tensors = [nn.Parameter(torch.randn(24, 40)), nn.Parameter(torch.randn(40))]
        for p in tensors:
            p.grad = torch.randn_like(p)
        optimizer, steps = make(contestant, tensors)
        assert {key: step.moved for key, step in steps.items()} == {"plain": 24, "accumulating": 32, "refreshing": 36}
        before = optimizer.state[tensors[0]]["basis_columns"].clone()
        for key, changes in (("plain", False), ("accumulating", False), ("refreshing", True)):
            steps[key].prepare()
            steps[key].run()
            assert torch.equal(before, optimizer.state[tensors[0]]["basis_columns"]) != changes, key
        with pytest.raises(UnavailableError, match="it turns matrices, and these are vectors"):
            make(contestant, tensors[1:])


def test_the_command_measures_writes_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for package in ("torchao", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    out, picture = tmp_path / "step.json", tmp_path / "step.png"
    only = ["anon float32", "anon, *", "torch *", "torchao adamw8bit", "bitsandbytes*", "deepspeed fused*"]
    small = ["--sizes", "2e5", "393216", "--pairs", "2", "--repeats", "3", "--device", "cpu"]
    main(["bench", *small, "--only", *only, "--json", str(out), "--plot", str(picture)])
    result, printed = json.loads(out.read_text()), capsys.readouterr().out

    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [x["elements"] for x in result["lists"]] == [196_608, 393_216]
    last = result["lists"][-1]
    moved = {(row["optimizer"], row["step"]): row["moved_bytes"] for row in last["rows"]}
    assert moved == {
        ("stream, 4 read 2 written", ""): 24,
        ("Anon float32", "plain"): 24,
        ("Anon float32", "accumulating"): 32,
        ("Anon float32", "refreshing"): 36,
        ("torch AdamW fused", "step"): 28,
        ("torch AdamW foreach", "step"): 28,
        ("Anon, the paper's loop", "step"): 32,
    }
    for row in last["rows"]:
        assert 0 < row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2]
        assert row["gb_per_s"] == pytest.approx(row["moved_bytes"] * 393_216 / row["milliseconds"][1] / 1e6)
        assert row["optimizer"] in printed
    ratios = {row["step"]: row["ratio"] for row in last["rows"] if row["optimizer"] == "Anon float32"}
    assert len(last["means"]) == 6
    for mean in last["means"]:
        assert min(r[0] for r in ratios.values()) <= mean["ratio"][1] <= max(r[2] for r in ratios.values())
    assert {k: v for k, v in last["state_bytes"].items() if "AdamW" in k} == {
        "torch AdamW fused": 8.0,
        "torch AdamW foreach": 8.0,
    }
    assert last["state_bytes"]["Anon float32"] == last["state_bytes"]["Anon, the paper's loop"] == 12.0
    assert last["peak_bytes"]["torch AdamW foreach"] > 10.0  # it works on copies of a whole list
    assert last["peak_bytes"]["Anon float32"] == pytest.approx(12.0, abs=1.0)  # the kernel needs none
    assert not result["lists"][0]["peak_bytes"]
    assert last["unavailable"] == {
        "torchao AdamW8bit": "not installed (pip install torchao)",
        "bitsandbytes AdamW8bit": "not installed (pip install bitsandbytes)",
        "DeepSpeed FusedAdam": "runs on cuda only",
    }
    assert all(reason in printed for reason in last["unavailable"].values())
    machine = result["machine"]
    assert f"{machine['device']}, {machine['cores']} cores" in printed
    assert machine["torch"] == torch.__version__
    assert machine["cores"] == len(os.sched_getaffinity(0))


def test_bitsandbytes_keeps_one_byte_for_each_state():
    pytest.importorskip("bitsandbytes")
    (contestant,) = (c for c in contestants() if c.name == "bitsandbytes AdamW8bit")
    optimizer, steps = make(contestant, parameters([[1 << 16]] * 2, CPU))
    assert sum(state_bytes(optimizer).values()) / (2 << 16) == pytest.approx(2.0, rel=0.05)
    assert list(steps) == ["step"]


def test_states_that_are_made_of_tensors_are_counted_by_these():
    states = pytest.importorskip("torchao.optim.subclass_8bit")
    held = states.OptimState8bit.zeros((4096,), signed=True, block_size=256)
    counted = state_bytes(types.SimpleNamespace(state={"p": {"exp_avg": held, "step": torch.zeros(())}}))
    assert counted == {
        "exp_avg": 4096 + 4 * 4096 // 256 + 4 * 256
    }  # codes, scales, and the 256 values that codes stand for


def test_few_large_tensors_are_whole_blocks():
    for elements in (4_000, 1_000_000, 60_000_000):
        shapes = few_large(elements)
        total = sum(n for (n,) in shapes)
        assert 0.99 * elements <= total <= elements
        assert elements < 10_000 or all(n % 256 == 0 for (n,) in shapes)


def test_a_failing_optimizer_is_unavailable_with_its_own_words():
    def build(tensors):
        raise RuntimeError("no such\nmachine")

    with pytest.raises(UnavailableError, match=r"^RuntimeError: no such machine$"):
        make(Contestant("x", build), parameters([[4]], CPU))


def test_a_stale_lock_of_deepspeeds_build_is_named(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (contestant,) = (c for c in contestants() if c.name == "DeepSpeedCPUAdam")
    with pytest.raises(UnavailableError, match=str(lock)):
        make(contestant, parameters([[4]], CPU))


def test_working_memory_is_what_a_step_takes_and_gives_back():
    torch.zeros(1 << 24).add_(1)  # what a first operation needs
    taken = working_bytes([Step(lambda: torch.zeros(1 << 24).add_(1), 0)], CPU)
    assert taken == pytest.approx(4 << 24, rel=0.1)


def test_the_stream_reads_four_arrays_and_writes_two():
    step = stream(100_003, CPU)
    arrays = inspect.getclosurevars(step.run).nonlocals["arrays"]
    for i, array in enumerate(arrays):
        array.fill_(10.0**i)
    step.run()
    assert [x.unique().tolist() for x in arrays] == [[11.0], [10.0], [1100.0], [1000.0]]


def test_lists_of_models_are_the_published_ones():
    shapes = model_shapes("gpt2-small")
    assert len(shapes) == 148
    assert sum(torch.Size(s).numel() for s in shapes) == 124_439_808


@pytest.mark.parametrize("word", ["plan", "scaling", "train"])
def test_the_first_argument_names_the_other_benchmarks(word, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, f"anon_dist.bench.{word}", types.SimpleNamespace(main=seen.append))
    data = ["--data", "d"] if word == "train" else []
    main(["bench", f"--{word}", *data, "--json", "x"])
    main(["bench", word, *data, "--json", "x"])
    assert [(type(o).__name__.lower(), str(o.json)) for o in seen] == [(f"{word}options", "x")] * 2


def test_a_name_that_matches_nothing_is_answered_with_the_names():
    with pytest.raises(SystemExit, match=r"matches none of: Anon float32.*torchao AdamW8bit"):
        main(["bench", "--only", "sgd"])
