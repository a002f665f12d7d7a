"""torchao's states in few bits: read as the numbers that they stand for, without its code; in the structure of torchao 0.18's pickles."""

import itertools
import sys
import types

import pytest
import torch
from torch import nn

from anon_dist.checkpoint import CheckpointError
from anon_dist.checkpoint.convert import convert, inspect
from anon_dist.checkpoint.formats import open_checkpoint
from anon_dist.checkpoint.options import AnonOptions, WriteOptions
from anon_dist.checkpoint.schema import Key
from anon_dist.checkpoint.verify import verify

KINDS = {"8bit": "OptimState8bit", "4bit": "OptimState4bit", "fp8": "OptimStateFp8"}
BLOCK = 32


class _Wrapper(torch.Tensor):
    """A wrapper subclass, as `TorchAOBaseTensor` is: its tensors are attributes."""

    @staticmethod
    def __new__(cls, attributes, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, attributes, shape):
        vars(self).update(attributes)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls(vars(args[0]), args[0].shape)


def quantised(kind, shape, monkeypatch, module=None):
    """A state of random bits, and what torchao documents that it stands for."""
    module = module or f"torchao.optim.subclass_{kind}"
    for part in itertools.accumulate(module.split("."), "{}.{}".format):
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    name = KINDS.get(kind, kind)
    if not hasattr(sys.modules[module], name):
        setattr(sys.modules[module], name, type(name, (_Wrapper,), {"__module__": module}))
    made = getattr(sys.modules[module], name)
    numel = torch.Size(shape).numel()
    bits = {"8bit": 256, "4bit": 16}.get(kind, 256)
    code = torch.randint(0, bits, (numel,), dtype=torch.uint8)
    scale = torch.rand(numel // BLOCK) + 0.1
    qmap, _ = torch.randn(bits).sort()
    attributes = {"codes": code.view(shape), "scale": scale, "qmap": qmap, "signed": True, "block_size": BLOCK}
    values = qmap[code.long()]
    if kind == "4bit":
        attributes |= {"codes": code[::2] * 16 + code[1::2], "_shape": torch.Size(shape)}
    if kind == "fp8":
        codes = torch.randn(shape).to(torch.float8_e4m3fn)
        attributes, values = {"codes": codes, "scale": scale, "block_size": BLOCK}, codes.float().view(-1)
    return made(attributes, shape), (values * scale.repeat_interleave(BLOCK)).view(shape)


def saved(path, kind, monkeypatch, decay=0.0):
    """A model of which one matrix is large enough to be quantised, as torchao decides; and what its states are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
    states, expected = {}, {}
    for i, (name, p) in enumerate(model.named_parameters()):
        pairs = [
            quantised(kind, tuple(p.shape), monkeypatch) if i == 0 else (x := torch.rand(p.shape), x) for _ in range(2)
        ]
        states[i] = {"step": torch.tensor(5.0), "exp_avg": pairs[0][0], "exp_avg_sq": pairs[1][0]}
        expected[name] = {"exp_avg": pairs[0][1], "exp_avg_sq": pairs[1][1].abs() if i else pairs[1][1]}
    group = {"lr": torch.tensor(1e-3), "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay, "amsgrad": False}
    optimizer = {"state": states, "param_groups": [{**group, "params": list(range(4))}]}
    torch.save({"model": model.state_dict(), "optimizer": optimizer}, path)
    for module in [m for m in sys.modules if m.startswith("torchao")]:
        monkeypatch.delitem(sys.modules, module)
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_numbers_that_they_stand_for(tmp_path, monkeypatch, kind):
    expected = saved(tmp_path / "a.pt", kind, monkeypatch)
    found = open_checkpoint(tmp_path / "a.pt")
    assert found.manifest.optimizer == "AdamW"
    for name, own in expected.items():
        for state, value in own.items():
            for start, stop in ((0, value.numel()), (3, 3), (1, 2), (2, min(value.numel(), 77))):
                assert torch.equal(found.read(Key(name, state), start, stop), value.flatten()[start:stop])
    assert "torchao" not in sys.modules
    convert(tmp_path / "a.pt", tmp_path / "dcp", "dcp", WriteOptions(world_size=3))
    assert verify(tmp_path / "a.pt", tmp_path / "dcp") == []
    convert(tmp_path / "dcp", tmp_path / "b.pt", "consolidated")
    states = torch.load(tmp_path / "b.pt")["optimizer"]["state"]
    assert torch.equal(states["0.weight"]["exp_avg"], expected["0.weight"]["exp_avg"])
    assert any("float32 numbers here that they stand for" in note for note in inspect(tmp_path / "a.pt")["notes"])


def test_a_decay_of_which_nothing_is_recorded(tmp_path, monkeypatch):
    saved(tmp_path / "a.pt", "8bit", monkeypatch, decay=0.1)
    with pytest.raises(CheckpointError, match=r"does not say whether it is decoupled.*--anon.decoupled"):
        convert(tmp_path / "a.pt", tmp_path / "b", "dcp", optimizer=AnonOptions())
    convert(tmp_path / "a.pt", tmp_path / "b", "dcp", optimizer=AnonOptions(decoupled=True))
    assert open_checkpoint(tmp_path / "b").manifest.groups[0].hyperparameters["weight_decay"] == 0.1


def test_what_is_none_of_them_or_damaged_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    for change in ({"scale": torch.rand(5)}, {"qmap": torch.rand(255)}, {"codes": torch.zeros(7, dtype=torch.uint8)}):
        state, _ = quantised("8bit", (4, 64), monkeypatch)
        vars(state).update(change)
        torch.save({"state": {0: {"exp_avg": state}}, "param_groups": [{"params": [0]}]}, path)
        with pytest.raises(CheckpointError, match=r"a.pt is damaged, .*OptimState8bit whose codes, scales and shape"):
            open_checkpoint(path)
    state, _ = quantised("AffineQuantizedTensor", (4, 64), monkeypatch, module="torchao.dtypes.affine")
    torch.save({"state": {0: {"exp_avg": state}}, "param_groups": [{"params": [0]}]}, path)
    with pytest.raises(CheckpointError, match=r"a.pt holds tensors of a subclass, as torchao's .*dequantize"):
        open_checkpoint(path)
