"""The lock that a killed build of DeepSpeed's leaves, told from those of builds that began since."""

import logging
import os
import time

import torch.utils.cpp_extension as extensions
from torch.utils.file_baton import FileBaton

from anon_dist.engines.builds import warn_of_waiting


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
