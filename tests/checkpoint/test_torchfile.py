"""Files of torch.save, read without running code and written without having the tensors."""

import io
import os
import pickle
import random
import sys
import types
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from checkpoints import fill
from hypothesis import given, settings
from hypothesis import strategies as st

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.schema import Key, Part, Stub
from anon_dist.checkpoint.torchfiles.pickles import StandIn
from anon_dist.checkpoint.torchfiles.torchfile import lay_out, open_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn)


def stub(shape, dtype=torch.float32, name="w"):
    return Stub(shape, dtype, [Part(Key(name, "weight"), 0, torch.Size(shape).numel())])


def written(path: Path, obj, source=None) -> Path:
    fill(path, lay_out(PurePosixPath("."), obj), source or {})
    return path


@pytest.mark.parametrize("how", [{"mmap": True}, {"mmap": False}, {"weights_only": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_load_takes_what_was_laid_out(tmp_path, how, dtype):
    a, b = torch.arange(35).reshape(5, 7).to(dtype), torch.arange(3).to(dtype)
    tied = stub((5, 7), dtype, "a")
    obj = {
        "a": tied,
        "again": tied,
        "b": stub((3,), dtype, "b"),
        "none": stub((0, 4), dtype),
        "scalar": torch.tensor(2.5),
    }
    obj["parameter"] = torch.nn.Parameter(torch.ones(3, 2).t())
    path = written(tmp_path / "f.pt", obj, {Key("a", "weight"): a, Key("b", "weight"): b})
    read = torch.load(path, **how)
    assert torch.equal(read["a"].view(torch.uint8), a.view(torch.uint8))
    assert read["again"] is read["a"]
    assert torch.equal(read["b"].view(torch.uint8), b.view(torch.uint8))
    assert read["none"].shape == (0, 4)
    assert read["none"].dtype == dtype
    assert torch.equal(read["scalar"], torch.tensor(2.5))
    assert type(read["parameter"]) is torch.nn.Parameter
    assert torch.equal(read["parameter"], torch.ones(2, 3))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=12), st.text(max_size=5))
def test_the_file_is_as_long_as_torchs(sizes, name):
    """Record for record at torch's offsets, which torch may compute instead of reading them."""
    tensors = {f"{name}{i}": torch.full((n,), float(i)) for i, n in enumerate(sizes)}
    laid_out = lay_out(PurePosixPath("."), {k: stub(tuple(v.shape), name=k) for k, v in tensors.items()})
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    pickled = next(data for _, data in laid_out.literals if data.startswith(b"\x80\x02"))
    theirs = torch._C.PyTorchFileReader(io.BytesIO(buffer.getvalue()))
    slack = len(theirs.get_record("data.pkl")) - len(pickled)
    assert abs(laid_out.size - len(buffer.getvalue())) <= abs(slack) + 128
    for i in range(len(sizes)):
        offset = theirs.get_record_offset(f"data/{i}")
        ours = [r.offset for r in laid_out.regions if r.part.key == Key(f"{name}{i}", "weight")]
        assert not ours or (ours[0] - offset) % 64 == 0


def test_parts_padding_and_casts(tmp_path):
    """A tensor put together from parts of several, zeros between them, in another dtype."""
    source = {Key("a", "m"): torch.arange(10.0), Key("b", "m"): torch.arange(10.0) + 100}
    parts = [Part(Key("a", "m"), 2, 4), Part(None, 0, 3), Part(Key("b", "m"), 9, 10)]
    path = written(tmp_path / "f.pt", [Stub((2, 3), torch.bfloat16, parts)], source)
    expected = torch.tensor([[2.0, 3, 0], [0, 0, 109]]).bfloat16()
    assert torch.equal(torch.load(path)[0], expected)
    with pytest.raises(ValueError, match="24 bytes for a tensor"):
        lay_out(PurePosixPath("x"), Stub((7,), torch.float32, parts))


def test_files_over_four_gigabytes(tmp_path):
    """Sizes and offsets that need 64 bits; the file is sparse."""
    n = 2**30 + 5
    laid_out = lay_out(PurePosixPath("."), {"a": stub((n,)), "b": stub((4,), name="b"), "c": torch.ones(2)})
    assert laid_out.size > 2**32
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.truncate(laid_out.size)
        for offset, data in laid_out.literals:
            os.pwrite(file.fileno(), data, offset)
        for region, value in zip(laid_out.regions, (7.0, 9.0), strict=True):
            os.pwrite(file.fileno(), torch.tensor([value]).numpy().tobytes(), region.offset)
    for offsets in (False, True):
        torch.utils.serialization.config.load.calculate_storage_offsets = offsets
        try:
            read = torch.load(path, mmap=True)
        finally:
            torch.utils.serialization.config.load.calculate_storage_offsets = False
        assert read["a"].shape == (n,)
        assert (read["a"][0], read["a"][-1], read["b"][0]) == (7, 0, 9)
        assert torch.equal(read["c"], torch.ones(2))


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_is_run(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"a": torch.ones(1), "b": Marker(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match=r"evil.pt holds an object of posix.mkdir.*--unsafe"):
        open_torch(path)
    assert not (tmp_path / "ran").exists()
    open_torch(path, unsafe=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "builtins.getattr", "torch.serialization.load", "torch._utils._import_dotted_name", "numpy.load"],
)
def test_dangerous_names_are_refused(tmp_path, name):
    module, _, function = name.rpartition(".")
    path = tmp_path / "f.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(Named(module, function), path)
    with pytest.raises(CheckpointError, match=name):
        open_torch(path)


class Named:
    """Pickled as a call of a function that need not exist."""

    def __init__(self, module, function):
        self.module, self.function = module, function

    def __reduce__(self):
        return getattr(sys.modules[self.module], self.function), ("1",)


FOREIGN = {
    "deepspeed.utils.tensor_fragment": "class fragment_address:\n    def __init__(self, n, s): self.numel, self.start = n, s",
    "deepspeed.runtime.zero.config": "import enum\nclass ZeroStageEnum(enum.IntEnum):\n    gradients = 2",
    "omegaconf.dictconfig": "class DictConfig(dict): pass",
    "omegaconf.listconfig": "class ListConfig(list): pass",
}


@pytest.fixture
def foreign():
    """Packages that are there when a file is written, and gone when it is read: their modules by name."""
    saved = {k: v for k, v in sys.modules.items() if k.split(".")[0] in ("deepspeed", "omegaconf")}
    for k in saved:
        del sys.modules[k]
    made = {}
    for name, source in FOREIGN.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            made.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        made[name] = types.ModuleType(name)
        exec(source, made[name].__dict__)
    sys.modules.update(made)
    yield made
    for k in made:
        sys.modules.pop(k, None)
    sys.modules.update(saved)


def test_foreign_classes_stand_in_and_are_written_again(tmp_path, foreign):
    address = foreign["deepspeed.utils.tensor_fragment"].fragment_address
    stage = foreign["deepspeed.runtime.zero.config"].ZeroStageEnum.gradients
    mapping, sequence = foreign["omegaconf.dictconfig"].DictConfig, foreign["omegaconf.listconfig"].ListConfig
    original = {
        "address": address(7, 3),
        "stage": stage,
        "mapping": mapping(a=1, b=address(1, 2)),
        "sequence": sequence([1, (2, 3)]),
        "class": address,
        "tensor": torch.ones(2),
    }
    torch.save(original, tmp_path / "a.pt")
    modules = {k: sys.modules.pop(k) for k in foreign}
    read = open_torch(tmp_path / "a.pt")
    assert isinstance(read["address"], StandIn)
    assert (read["address"].numel, read["address"].start) == (7, 3)
    assert "deepspeed.runtime.zero.config.ZeroStageEnum(2)" in repr(read["stage"])
    assert not set(foreign) & set(sys.modules)
    written(tmp_path / "b.pt", read)
    sys.modules.update(modules)
    again = torch.load(tmp_path / "b.pt", weights_only=False)
    assert (again["address"].numel, again["address"].start) == (7, 3)
    assert again["stage"] is stage
    assert type(again["mapping"]) is mapping
    assert again["mapping"]["a"] == 1
    assert again["sequence"] == [1, (2, 3)]
    assert again["class"] is address


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enumeration; or as somebody's who wants another attribute."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_that_are_pickled_by_name(tmp_path, foreign):
    stages = foreign["deepspeed.runtime.zero.config"].ZeroStageEnum
    devices = type("OffloadDeviceEnum", (), {"__module__": "deepspeed.runtime.zero.offload_config", "cpu": "cpu"})
    offload = types.ModuleType("deepspeed.runtime.zero.offload_config")
    offload.OffloadDeviceEnum = devices
    sys.modules[offload.__name__] = offload
    torch.save({"stage": ByName(stages, "gradients"), "device": ByName(devices, "cpu")}, tmp_path / "a.pt")
    modules = {k: sys.modules.pop(k) for k in (*foreign, offload.__name__)}
    read = open_torch(tmp_path / "a.pt")
    assert "ZeroStageEnum(2)" in repr(read["stage"])
    assert isinstance(read["device"], StandIn)
    written(tmp_path / "b.pt", read)
    sys.modules.update(modules)
    again = torch.load(tmp_path / "b.pt", weights_only=False)
    assert again["stage"] is stages.gradients
    assert again["device"] == "cpu"
    del sys.modules[offload.__name__]


@pytest.mark.parametrize("of", ["harmless class", "stand-in"])
def test_other_attributes_are_taken_from_nothing(tmp_path, foreign, of):
    stages = foreign["deepspeed.runtime.zero.config"].ZeroStageEnum
    torch.save(
        ByName(OrderedDict, "fromkeys") if of == "harmless class" else ByName(stages, "__init__"), tmp_path / "a.pt"
    )
    with pytest.raises(CheckpointError, match=r"builtins\.getattr of (OrderedDict|ZeroStageEnum)"):
        open_torch(tmp_path / "a.pt")


def test_what_training_scripts_save_is_read(tmp_path):
    """numpy arrays and scalars, random states, dates, default dictionaries."""
    value = {
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "scalar": np.float64(1.5),
        "array": np.arange(6).reshape(2, 3),
        "default": defaultdict(dict, a={"b": 1}),
        "ordered": OrderedDict(a=1),
        "dtype": torch.bfloat16,
        "path": Path("/x"),
        "size": torch.Size([1, 2]),
    }
    torch.save(value, tmp_path / "f.pt")
    read = open_torch(tmp_path / "f.pt")
    assert read["python"] == value["python"]
    assert np.array_equal(read["numpy"][1], value["numpy"][1])
    assert read["scalar"] == 1.5
    assert np.array_equal(read["array"], value["array"])
    assert {k: read[k] for k in ("default", "ordered", "dtype", "path", "size")} == {
        k: value[k] for k in ("default", "ordered", "dtype", "path", "size")
    }


def test_optimizer_schedules_are_kept(tmp_path):
    """torch.optim's objects inside a checkpoint (some save the scheduler itself) are not imported, their attributes are there."""
    p = torch.nn.Parameter(torch.ones(1))
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([p], lr=1.0), 3)
    torch.save({"schedule": schedule.state_dict()}, tmp_path / "f.pt")
    assert open_torch(tmp_path / "f.pt")["schedule"]["step_size"] == 3


def test_old_files_are_read(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(open_torch(tmp_path / "f.pt")["a"], torch.arange(3))


def test_damage_is_named(tmp_path):
    path = tmp_path / "f.pt"
    torch.save({"a": torch.arange(3000)}, path)
    whole = path.read_bytes()
    for cut in (0, 1, 100, 1000, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"f.pt is damaged"):
            open_torch(path)
    path.write_bytes(pickle.dumps("no file of torch"))
    with pytest.raises(CheckpointError, match=r"f.pt is damaged"):
        open_torch(path)
    with pytest.raises(CheckpointError, match=r"nowhere.pt does not exist"):
        open_torch(tmp_path / "nowhere.pt")
