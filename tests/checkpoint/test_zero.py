"""DeepSpeed's checkpoints, made and loaded by DeepSpeed in `zero_cases.py` on two ranks; here they are read and written without it."""

import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import torch
from helpers import assert_passed, launch_ranks
from hypothesis import given
from hypothesis import strategies as st
from zero_tables import CASES, SOURCES

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.copy import write_files
from anon_dist.checkpoint.formats import detect, open_checkpoint, plan
from anon_dist.checkpoint.options import ReadOptions, WriteOptions
from anon_dist.checkpoint.schema import MASTER, WEIGHT, Checkpoint, Key, Manifest, ParamGroup, Ref, TensorInfo
from anon_dist.checkpoint.zero.flat import group_cuts, group_partition, shard_cuts, sub_groups

pytest.importorskip("deepspeed")
RANKS = 2
STEP = "global_step4"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder with a checkpoint of each of `SOURCES`, and what DeepSpeed said of it."""
    return launch_ranks(Path(__file__).with_name("zero_cases.py"), RANKS, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("case", CASES)
def test_case(case, launched):
    assert_passed(f"case_{case}", launched, RANKS)


def whole(checkpoint, name, state):
    info = checkpoint.tensors[Key(name, state)]
    return checkpoint.read(Key(name, state), 0, info.numel).view(info.shape)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_read_is_what_deepspeed_says(source, launched):
    told = torch.load(launched / source / "oracle.pt", weights_only=False)
    stage = SOURCES[source][1]
    for path in (launched / source, launched / source / STEP):
        assert detect(path) == f"zero{stage}"
    checkpoint = open_checkpoint(launched / source)
    manifest = checkpoint.manifest
    for name, value in told["weights"].items():
        if name not in manifest.tied:
            assert torch.equal(whole(checkpoint, name, WEIGHT), value)
            assert checkpoint.tensors[Key(name, WEIGHT)].dtype == value.dtype
    for name, value in told["buffers"].items():
        assert torch.equal(whole(checkpoint, name, WEIGHT), value)
    for name, value in told["masters"].items():
        key = MASTER if Key(name, MASTER) in checkpoint.tensors else WEIGHT
        assert key == MASTER or source == "stage0_anon"
        assert torch.equal(whole(checkpoint, name, key), value)
        held = {k.state for k in checkpoint.tensors if k.parameter == name} - {WEIGHT, MASTER}
        assert held == set(told["states"][name])
        for state, expected in told["states"][name].items():
            assert torch.equal(whole(checkpoint, name, state), expected)
        assert {k: float(v) for k, v in manifest.scalars.get(name, {}).items()} == told["scalars"]
    groups = [(g.members, g.hyperparameters) for g in manifest.groups]
    elastic = "elastic" in source  # which records no hyperparameters, and says so
    assert groups == ([(members, {}) for members, _ in told["groups"]] if elastic else told["groups"])
    assert any("elastic" in note for note in manifest.notes) == elastic
    assert (manifest.step, manifest.world_size, manifest.buffers) == (4, RANKS, ["scale"])
    assert (manifest.frozen, manifest.tied) == (["frozen.weight", "frozen.bias"], {"a2.weight": "a.weight"})
    assert manifest.optimizer == {"anon": "Anon", "adamw": "AdamW", "lion": "Lion"}[SOURCES[source][0]]
    assert manifest.extras["client_state"] == {"cursor": 32, "note": source}
    assert manifest.extras["lr_scheduler"]["last_epoch"] == 4


@pytest.mark.parametrize("source", ["stage2_anon", "stage3_sub_groups_anon", "stage2_round_robin_adamw"])
def test_ranges_are_views_of_the_file(source, launched):
    checkpoint = open_checkpoint(launched / source)
    expected = whole(checkpoint, "a.weight", "exp_avg").flatten()
    for start, stop in ((0, 1), (1000, 1001), (1900, 2100), (3968, 3969), (5, 5)):
        assert torch.equal(checkpoint.read(Key("a.weight", "exp_avg"), start, stop), expected[start:stop])
    value = checkpoint.read(Key("a.weight", "exp_avg"), 10, 20)
    assert value.untyped_storage().nbytes() > 10 * 4, "copied"


def contents(checkpoint):
    """All that a checkpoint holds, comparable."""
    tensors = {k: (i, checkpoint.read(k, 0, i.numel)) for k, i in checkpoint.tensors.items()}
    scalars = {n: {k: (type(v), float(v)) for k, v in own.items()} for n, own in checkpoint.manifest.scalars.items()}
    manifest = checkpoint.manifest
    kept = (manifest.groups, manifest.order, manifest.buffers, manifest.frozen, manifest.tied, manifest.step)
    extras = {k: manifest.extras.get(k) for k in ("lr_scheduler", "client_state", "skipped_steps", "global_samples")}
    return tensors, scalars, (kept, extras, manifest.optimizer)


def assert_same(a, b, without_masters=False):
    (tensors, scalars, rest), (others, other_scalars, other_rest) = contents(a), contents(b)
    if without_masters:  # stage 0 in float32 steps the weights themselves
        tensors = {k: v for k, v in tensors.items() if k.state != MASTER}
    assert tensors.keys() - others.keys() == set()
    for key, (info, value) in tensors.items():
        assert others[key][0] == info, key
        assert torch.equal(others[key][1], value), key
    assert other_scalars == scalars
    assert other_rest == rest


@pytest.mark.parametrize(
    ("source", "world_size"),
    [
        ("stage0_anon", 1),
        ("stage0_anon", 8),
        ("stage1_bf16_optimizer_anon", 3),
        ("stage2_lion", 4),
        ("stage2_round_robin_adamw", 2),
        ("stage3_bf16_adamw", 8),
    ],
)
def test_every_stage_and_world_size_gives_everything_back(source, world_size, launched, tmp_path):
    original = open_checkpoint(launched / source)
    previous = launched / source
    plans = [("zero2", {"round_robin_gradients": True}), ("zero3", {"sub_group_size": 100}), ("zero1", {})]
    plans += [("universal", {}), ("zero3", {}), ("zero0", {})]
    for i, (to, options) in enumerate(plans):  # each from the one before
        target = tmp_path / str(i)
        convert(previous, target, to, WriteOptions(world_size=world_size, **options))
        assert detect(target) == to
        without_masters = original.tensors[Key("a.weight", WEIGHT)].dtype == torch.float32 and to == "zero0"
        assert_same(original, open_checkpoint(target), without_masters)
        previous = target


def tensors_of(state, found):
    """Every tensor in a file that has this key."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    for key, value in items:
        if key == found and isinstance(value, torch.Tensor):
            yield value
        else:
            yield from tensors_of(value, found)


@pytest.mark.parametrize("to", ["zero1", "zero2", "zero3"])
def test_preconditioners_of_the_padding_are_1_as_a_run_has_them(to, launched, tmp_path):
    """Of 0 a refresh would make NaN, and it would be in every norm over a rank's share."""
    ranks, padding = 7, 0
    convert(launched / "stage2_anon", tmp_path / "out", to, WriteOptions(world_size=ranks))
    for rank in range(ranks):
        states = torch.load(rank_file(tmp_path / "out", rank), weights_only=False)
        found = torch.cat([x.view(-1) for x in tensors_of(states, "precond")])
        assert (found > 0).all()
        padding += int(found.eq(1.0).sum())
    assert padding  # 7 divides none of the groups


def test_files_have_the_name_of_the_precision(launched, tmp_path):
    for source, prefix in (("stage3_bf16_adamw", "bf16_"), ("stage2_anon", "")):
        convert(launched / source, tmp_path / source, "zero2", WriteOptions(world_size=2))
        names = {p.name for p in (tmp_path / source / STEP).iterdir()}
        optimizer = {f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2)}
        assert names == {"mp_rank_00_model_states.pt", *optimizer}


def test_precision_survives_a_format_without_masters(launched, tmp_path):
    """DCP has float32 weights alone; the recorded configuration tells that the engine ran in bf16."""
    original = open_checkpoint(launched / "stage3_bf16_adamw")
    convert(launched / "stage3_bf16_adamw", tmp_path / "dcp", "dcp", WriteOptions(world_size=4))
    convert(tmp_path / "dcp", tmp_path / "back", "zero3", WriteOptions(world_size=2))
    assert rank_file(tmp_path / "back", 0).name.startswith("bf16_")
    assert_same(original, open_checkpoint(tmp_path / "back"))


def test_precision_asked_for(launched, tmp_path):
    original = open_checkpoint(launched / "stage2_anon")
    convert(launched / "stage2_anon", tmp_path / "out", "zero3", WriteOptions(precision="bfloat16"))
    found = open_checkpoint(tmp_path / "out")
    assert rank_file(tmp_path / "out", 0).name.startswith("bf16_")
    for key in original.tensors:
        value = whole(original, *key)
        rounded = key.state == WEIGHT and key.parameter != "scale"
        assert torch.equal(whole(found, *key), value.bfloat16() if rounded else value), key


def test_a_run_goes_with_what_lies_beside(launched, tmp_path):
    """The training loop's folder: no `latest`, its progress and random states beside the tag."""
    run = tmp_path / "step-00000004"
    shutil.copytree(launched / "stage2_anon" / STEP, run / "deepspeed")
    (run / "trainer.json").write_text('{"step": 4, "samples": 32, "world_size": 2}')
    torch.save({"torch": torch.arange(5, dtype=torch.uint8)}, run / "random-00000.pt")
    assert detect(run) == "zero2"
    convert(run, tmp_path / "out", "zero3", WriteOptions(world_size=4))
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    ranks = {f"deepspeed/zero_pp_rank_{r}_mp_rank_00_{k}_states.pt" for r in range(4) for k in ("optim", "model")}
    assert names == {"latest", "trainer.json", "checksums.json", "random-00000.pt", *ranks}
    found = open_checkpoint(tmp_path / "out")
    assert found.manifest.extras["progress"] == {"step": 4, "samples": 32, "world_size": 4}
    assert found.manifest.extras["rng"][0]["torch"].tolist() == [0, 1, 2, 3, 4]
    assert_same(open_checkpoint(run), found)


def test_accelerate_finds_its_names(launched, tmp_path):
    convert(launched / "stage2_anon", tmp_path / "out", "zero2", WriteOptions(world_size=2, layout="accelerate"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"latest", "pytorch_model", "scheduler.bin"}
    assert_same(open_checkpoint(launched / "stage2_anon"), open_checkpoint(tmp_path / "out"))


def test_deepspeed_is_not_imported(launched, tmp_path):
    code = f"""
import sys
from fractions import Fraction
from pathlib import Path
from anon_dist.checkpoint.convert import convert
from anon_dist.checkpoint.options import WriteOptions
convert(Path({str(launched / "stage2_anon")!r}), Path({str(tmp_path / "out")!r}), "zero3", WriteOptions(world_size=3))
assert not [m for m in sys.modules if m.startswith("deepspeed")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


# -- what is wrong is named -------------------------------------------------------------------------------------------


@pytest.fixture
def copied(launched, tmp_path):
    """A function that copies a source, to be damaged."""

    def copy(source):
        return Path(shutil.copytree(launched / source, tmp_path / "copy"))

    return copy


def rank_file(folder, rank, kind="optim"):
    return next(iter((folder / STEP).glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")))


@pytest.mark.parametrize("source", ["stage2_anon", "stage3_anon", "stage1_bf16_optimizer_anon"])
@pytest.mark.parametrize("rank", [0, 1])
def test_missing_rank(source, rank, copied):
    folder = copied(source)
    file = rank_file(folder, rank)
    file.unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert (file.name if rank == 0 else "2 ranks wrote this, and 1 have optimizer states") in str(caught.value)


def test_no_optimizer_files(copied):
    folder = copied("stage2_anon")
    for rank in range(RANKS):
        rank_file(folder, rank).unlink()
    with pytest.raises(CheckpointError, match="the optimizer states of all 2 ranks are missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("source", ["stage2_anon", "stage3_anon"])
def test_truncated_file(source, copied):
    folder = copied(source)
    file = rank_file(folder, 1)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=file.name):
        open_checkpoint(folder)


def edit(file, change):
    saved = torch.load(file, weights_only=False)
    change(saved)
    torch.save(saved, file)


def test_mixed_steps(copied):
    folder = copied("stage2_anon")
    file = rank_file(folder, 1)
    edit(file, lambda s: s["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"].fill_(7))
    with pytest.raises(
        CheckpointError, match=rf"{file.name}: step is 7.0, in .*rank_0.* 4.0: files of different steps"
    ):
        open_checkpoint(folder)


def test_mixed_steps_of_the_model_states(copied):
    folder = copied("stage3_anon")
    file = rank_file(folder, 1, "model")
    edit(file, lambda s: s.update(global_steps=8))
    with pytest.raises(CheckpointError, match=rf"{file.name}: global_steps is 8"):
        open_checkpoint(folder)


@pytest.mark.parametrize("source", ["stage2_anon", "stage3_anon"])
def test_wrong_length(source, copied):
    folder = copied(source)
    file = rank_file(folder, 1)

    def shorten(saved):
        inner = saved["optimizer_state_dict"]
        state = (inner.get("base_optimizer_state") or inner["optimizer_state_dict"])["state"]
        state[0]["precond"] = state[0]["precond"][:-9].clone()

    edit(file, shorten)
    with pytest.raises(CheckpointError, match=rf"{file.name}: precond"):
        open_checkpoint(folder)


@pytest.mark.parametrize("source", ["stage2_anon", "stage3_anon"])
def test_wrong_length_on_every_rank(source, copied):
    """It is damage, not a state of the ranks' parts as such."""
    folder = copied(source)
    for rank in range(RANKS):

        def shorten(saved):
            inner = saved["optimizer_state_dict"]
            state = (inner.get("base_optimizer_state") or inner["optimizer_state_dict"])["state"]
            state[0]["exp_avg"] = state[0]["exp_avg"][:3].clone()

        edit(rank_file(folder, rank), shorten)
    with pytest.raises(CheckpointError, match=r"optim_states\.pt: exp_avg"):
        open_checkpoint(folder)


@pytest.mark.parametrize("source", ["stage1_bf16_optimizer_anon", "stage2_anon", "stage3_anon"])
def test_a_parameter_is_gone(source, copied):
    folder = copied(source)
    for file in (folder / STEP).glob("*model_states.pt"):
        edit(file, lambda s: s["param_shapes"][0].pop("head.weight"))
    with pytest.raises(CheckpointError, match=r"optim_states\.pt: .* elements"):
        open_checkpoint(folder)


def mangle(value, random):
    """A random entry somewhere in nested dictionaries is dropped, renamed or replaced."""
    inner = [v for v in value.values() if isinstance(v, dict) and v]
    if inner and random.random() < 0.7:
        return mangle(random.choice(inner), random)
    key = random.choice(list(value))
    kept = value.pop(key)
    if random.random() < 0.6:
        value[random.choice([key, "other"])] = random.choice([None, 3, [], {}, torch.zeros(3), [kept]])


@pytest.mark.parametrize("source", ["stage0_anon", "stage1_bf16_optimizer_anon", "stage2_anon", "stage3_anon"])
def test_mangled_files_are_read_or_named(source, copied):
    folder, random = copied(source), Random(0)
    files = sorted((folder / STEP).glob("*.pt"))
    originals = {file: file.read_bytes() for file in files}
    for _ in range(25):
        file = random.choice(files)
        if random.random() < 0.7:
            edit(file, lambda saved: mangle(saved, random))
        else:
            data = bytearray(originals[file])
            for _ in range(5):
                data[random.randrange(3000)] = random.randrange(256)
            file.write_bytes(data)
        try:
            contents(open_checkpoint(folder))
        except CheckpointError as error:
            if str(folder) not in str(error):
                raise
        file.write_bytes(originals[file])


def test_missing_file_of_a_universal_checkpoint(launched, tmp_path):
    convert(launched / "stage2_anon", tmp_path / "out", "universal")
    (tmp_path / "out" / STEP / "zero" / "b.bias" / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=r"b\.bias.fp32\.pt is missing"):
        open_checkpoint(tmp_path / "out")


class Plain(Checkpoint):
    """In memory, of one weight of shape (4, 6)."""

    def __init__(self, states, scalars):
        self.values = {Key("w", WEIGHT): torch.randn(4, 6), **{Key("w", k): v for k, v in states.items()}}
        self.tensors = {k: TensorInfo(tuple(v.shape), v.dtype) for k, v in self.values.items()}
        groups = [ParamGroup(["w"], {"lr": 0.1, "param_names": ["w"]})]
        self.manifest = Manifest("plain", 1, None, groups, {"w": scalars}, ["w"])

    def read(self, key, start, stop):
        return self.values[key].flatten()[start:stop]


@pytest.mark.parametrize("to", ["zero2", "zero3", "universal"])
def test_state_of_another_shape_is_refused_by_name(to):
    shampoo = Plain({"exp_avg": torch.randn(4, 6), "left": torch.randn(4, 4)}, {"step": 3})
    with pytest.raises(CheckpointError, match=r"w: left has shape \(4, 4\), the parameter \(4, 6\)"):
        plan(shampoo, to, WriteOptions())
    plan(shampoo, to, WriteOptions(allow_loss=True))
    assert any("w: left has shape" in note for note in shampoo.manifest.notes)


def test_state_of_another_shape_stays_at_stage_0(tmp_path):
    nested = Ref(Key("w", "blocks.0"))
    states = {"exp_avg": torch.randn(4, 6), "left": torch.randn(4, 4), "blocks.0": torch.randn(2, 2)}
    shampoo = Plain(states, {"step": 3, "k": torch.tensor(2), "blocks": [nested, 0.5]})
    write_files(plan(shampoo, "zero0", WriteOptions()), shampoo, "", tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert found.tensors == shampoo.tensors
    assert all(torch.equal(whole(found, *key), value) for key, value in shampoo.values.items())
    assert found.manifest.scalars == shampoo.manifest.scalars


@pytest.mark.parametrize("to", ["zero2", "zero3"])
def test_parameters_without_elements_are_with_the_frozen_ones(to, tmp_path):
    """DeepSpeed's loader looks for them there."""
    source = Plain({"exp_avg": torch.randn(4, 6)}, {"step": 3})
    source.values[Key("empty", WEIGHT)] = torch.zeros(0, 3)
    source.tensors[Key("empty", WEIGHT)] = TensorInfo((0, 3), torch.float32)
    source.manifest.order.append("empty")
    source.manifest.groups[0].members.append("empty")
    write_files(plan(source, to, WriteOptions()), source, "", tmp_path / "out")
    file = next((tmp_path / "out").rglob("*model_states.pt"))
    found = torch.load(file, weights_only=False)
    assert found["frozen_param_shapes"] == {"empty": (0, 3)}
    assert [list(group) for group in found["param_shapes"]] == [["w"]]
    assert open_checkpoint(tmp_path / "out").tensors[Key("empty", WEIGHT)].shape == (0, 3)


def test_weights_alone_are_refused():
    bare = Plain({}, {})
    bare.manifest.groups = []
    with pytest.raises(CheckpointError, match="no optimizer state"):
        plan(bare, "zero2", WriteOptions())


# -- the arithmetic ---------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(SIZES, st.integers(1, 8))
def test_flat_groups_hold_every_element_once(sizes, world_size):
    """Against torch: concatenate, pad, split."""
    values = [torch.arange(n) + 100 * i for i, n in enumerate(sizes)]
    length = group_partition(sum(sizes), world_size)
    assert length * world_size >= sum(sizes) > (length - 2) * world_size - 1
    flat = torch.cat([*values, torch.full((length * world_size - sum(sizes),), -1)])
    for rank, part in enumerate(flat.split(length)):
        found = torch.full((length,), -1)
        for cut in group_cuts(sizes, [0] * len(sizes), length, rank):
            found[cut.offset : cut.offset + cut.stop - cut.start] = values[cut.member][cut.start : cut.stop]
        assert torch.equal(found, part)


@given(SIZES, st.integers(1, 8), st.integers(1, 60))
def test_shards_hold_every_element_once(sizes, world_size, limit):
    groups = sub_groups(sizes, world_size, limit)
    assert [m for g in groups for m in g] == list(range(len(sizes)))
    for members in groups:
        held = [torch.zeros(sizes[m], dtype=torch.int64) for m in members]
        for rank in range(world_size):
            for cut in shard_cuts([sizes[m] for m in members], world_size, rank):
                held[cut.member][cut.start : cut.stop] += 1
        assert all((h == 1).all() for h in held)


def test_names_given_by_the_user(launched):
    names = ["a.weight", "b.weight", "head.weight", "a.bias", "frozen.bias", "head.bias"]
    checkpoint = open_checkpoint(launched / "stage0_anon", ReadOptions(names=names))
    assert [m for g in checkpoint.manifest.groups for m in g.members] == names
    assert "b.bias" in checkpoint.manifest.frozen
    with pytest.raises(CheckpointError, match=r"nobody is not in the model"):
        open_checkpoint(launched / "stage0_anon", ReadOptions(names=["nobody", *names[1:]]))


def test_stage_0_without_names_is_not_guessed(launched, copied, tmp_path):
    """Shapes do not tell vectors apart; masters in bf16 do, where their contents differ."""

    def nameless(saved):
        wrapper = saved["optimizer"]
        for group in wrapper.get("optimizer_state_dict", wrapper)["param_groups"]:
            del group["param_names"]

    plain = copied("stage0_anon")
    wrapped = Path(shutil.copytree(launched / "stage0_bf16_adamw", tmp_path / "wrapped"))
    expected = open_checkpoint(wrapped).manifest.groups
    for folder in (plain, wrapped):
        edit(folder / STEP / "mp_rank_00_model_states.pt", nameless)
    with pytest.raises(
        CheckpointError, match=r"mp_rank_00_model_states.pt: .* in more than one way. Give --names FILE"
    ):
        open_checkpoint(plain)
    assert [g.members for g in open_checkpoint(wrapped).manifest.groups] == [g.members for g in expected]
    names = [m for g in expected for m in g.members]
    swapped = [*names[:1], names[2], names[1], *names[3:]]
    with pytest.raises(CheckpointError, match=r"is not its optimizer's parameter"):
        open_checkpoint(wrapped, ReadOptions(names=swapped))


def test_foreign_classes_are_built_only_if_the_user_insists(copied):
    folder = copied("stage2_anon")
    for rank in range(RANKS):
        path = rank_file(folder, rank)
        saved = torch.load(path, weights_only=False)
        torch.save({**saved, "ratio": Fraction(1, 2)}, path)
    with pytest.raises(CheckpointError, match=r"fractions\.Fraction.*--unsafe"):
        open_checkpoint(folder)
    found = open_checkpoint(folder, ReadOptions(unsafe=True)).manifest
    assert (found.format, found.optimizer) == ("zero2", "Anon")


def test_fused_wrapper_of_stage_0(launched, tmp_path):
    """FP16_Optimizer needs a GPU: its layout, one flat tensor for each group, made of the other wrapper's file."""
    original = open_checkpoint(launched / "stage0_bf16_adamw")
    folder = Path(shutil.copytree(launched / "stage0_bf16_adamw", tmp_path / "copy"))

    def flatten(saved):
        wrapper = saved["optimizer"]
        inner, masters = wrapper["optimizer_state_dict"], wrapper.pop("fp32_groups")
        wrapper["fp32_groups_flat"] = [torch.cat([m.detach().flatten() for m in group]) for group in masters]
        states = {}
        for i, group in enumerate(inner["param_groups"]):
            own = [inner["state"][j] for j in group["params"]]
            flat = {k: torch.cat([s[k].flatten() for s in own]) for k in ("exp_avg", "exp_avg_sq")}
            states[i] = {"step": own[0]["step"], **flat}
            group["params"] = [i]
        inner["state"] = states

    edit(folder / STEP / "mp_rank_00_model_states.pt", flatten)
    names = [m for g in original.manifest.groups for m in g.members]
    assert_same(original, open_checkpoint(folder, ReadOptions(names=names)))
    assert_same(original, open_checkpoint(folder))  # by the masters' contents
    with pytest.raises(CheckpointError, match=f"{names[1]} is not what its flat groups have next"):
        open_checkpoint(folder, ReadOptions(names=[names[1], names[0], *names[2:]]))
