"""The lock that a killed build of DeepSpeed's leaves, told from those of builds that began since."""

import contextlib
import importlib
import io
import logging
import os
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch.utils.cpp_extension as extensions
from torch.utils.file_baton import FileBaton

from anon_dist.engines.builds import announce, spare_inference_operator, warn_of_waiting


def test_a_lock_from_before_this_start_is_named_and_left(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        for name in ("old_op", "new_op"):
            (tmp_path / name).mkdir()
            assert FileBaton(str(tmp_path / name / "lock")).try_acquire()  # and its process ends without letting go
        os.utime(tmp_path / "old_op" / "lock", (0, time.time() - 86400))
        warn_of_waiting()
    (line,) = caplog.messages
    assert line.startswith(
        f"{tmp_path}/old_op/lock has been there for 86400 s: whoever needs the operator old_op waits"
    )
    assert line.endswith("this start waits for ever: remove that file")
    assert "\n" not in line
    assert (tmp_path / "old_op" / "lock").exists()


def test_the_default_place_is_torchs(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(extensions, "get_default_build_root", lambda: str(tmp_path))
    with caplog.at_level(logging.WARNING):
        warn_of_waiting()
        assert caplog.messages == []
        lock = extensions._get_build_directory("some_op", False) + "/lock"
        open(lock, "w").close()
        os.utime(lock, (0, 0))
        warn_of_waiting()
    assert caplog.messages[0].startswith(lock)


def test_a_training_on_cpus_does_not_wait_for_the_operator_of_inference(monkeypatch):
    """DeepSpeed asks for it as it joins the ranks, and would compile it then."""
    pytest.importorskip("deepspeed")
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    backend = importlib.import_module("deepspeed.comm.torch")
    monkeypatch.setattr(backend.get_accelerator(), "create_op_builder", lambda name: ShareMemCommBuilder())
    monkeypatch.setattr(ShareMemCommBuilder, "load", lambda self: "built")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, ShareMemCommBuilder.NAME, True)
    with contextlib.redirect_stdout(io.StringIO()):
        assert backend.build_shm_op() == "built"
    spare_inference_operator()
    assert backend.build_shm_op() is None


def test_a_script_of_ones_own_is_told_what_deepspeed_compiles_or_waits_for(tmp_path, monkeypatch, caplog):
    """Once for a machine: not when it is built, nor by the other ranks."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    name, built = "deepspeed_shm_comm", []
    monkeypatch.setitem(pytest.importorskip("deepspeed").ops.__compatible_ops__, name, True)
    accelerator = SimpleNamespace(create_op_builder=lambda asked: SimpleNamespace(NAME=name))
    backend = ModuleType("backend")
    backend.get_accelerator, backend.build_shm_op = lambda: accelerator, lambda: built.append(len(caplog.messages))
    announce(backend)

    def told(rank="0"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        caplog.clear()
        backend.build_shm_op()
        return caplog.messages

    (line,) = told()
    assert line.startswith(f"DeepSpeed compiles {name} for this machine, up to a minute, once: {tmp_path / name}. ")
    assert told("1") == []
    (tmp_path / name / f"{name}.so").touch()
    assert told() == []
    (tmp_path / name / f"{name}.so").unlink()
    (tmp_path / name / "lock").touch()
    os.utime(tmp_path / name / "lock", (0, 0))
    (line,) = told()
    assert line.startswith(f"{tmp_path / name}/lock has been there for ")
    assert built == [1, 0, 0, 1]  # before DeepSpeed begins
