"""The Anon optimizer. `update.py` is the paper's recurrence, `schedule.py` its refreshes, `reference.py` the oracle of the tests."""

from anon_dist.optim.anon import Anon
from anon_dist.optim.groups import param_groups
from anon_dist.optim.reference import ReferenceAnon
from anon_dist.optim.state import STATE_KEYS

__all__ = ["STATE_KEYS", "Anon", "ReferenceAnon", "param_groups"]
