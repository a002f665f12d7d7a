"""What `load_sharded` says of a checkpoint whose param groups are not the optimizer's."""

import pytest
import torch
from torch import nn

from anon_dist import Anon
from anon_dist.checkpoint import load_sharded, save_sharded
from anon_dist.checkpoint.errors import CheckpointError


@pytest.mark.parametrize(("there", "here"), [(1, 2), (2, 1)])
def test_other_param_groups_are_refused(tmp_path, there, here):
    """A group that is only here would keep its own γ as if the state had been made with it."""

    def made(count):
        model = nn.Linear(3, 2)
        groups = [{"params": list(model.parameters())}] if count == 1 else [{"params": [p]} for p in model.parameters()]
        return model, Anon(groups, gamma=0.5 if count == here else 1.0)

    model, optimizer = made(there)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_sharded(tmp_path / "saved", model, optimizer)
    model, optimizer = made(here)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        CheckpointError, match=r"saved was written with other param groups: \d+ (missing|unexpected), such as optim"
    ):
        load_sharded(tmp_path / "saved", model, optimizer)
    assert all(map(torch.equal, before, model.parameters()))
