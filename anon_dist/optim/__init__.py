"""The Anon optimizer (arXiv 2605.02317).

The words, each with one meaning:

- *preconditioner*: v = d^(−1/2), by which each element of the mean gradient m is multiplied. d is a mean of σ^γ over refreshes.
- *second moment*: s, the mean of g² since the last refresh; σ is s freed of its bias, plus ε.
- *refresh*: the step that makes v anew from s, and starts s from 0. Between refreshes v is constant.
- *age*: how many steps s holds. *Window*: the last steps before a refresh, in which alone s is read and written.
- *schedule*: at which steps refreshes lie (`schedule.py`). A *phase* of it: a stretch of steps with the same ρ, β2 and window.
- *regime*: what a param group's state was made with, and what follows for the next step (`regime.py`); its *history* lies in the group.
- *γ in force*: the one that a group's preconditioners are of. A *pending* γ was set in the group and waits for a refresh, in which it comes
  into force. *γ°*: the one that a preconditioner was made with. To *convert* it is to bring it from γ° to another γ: d^(γ/γ°).
- *hidden*: a parameter that its group does not show at the moment (`hidden.py`). *Foremost*: those of a group with the most steps.
- *basis*: an orthogonal matrix, in blocks, into which a *side* of a matrix parameter (its columns or its rows) is turned (`basis.py`).
  *Frame*: the bases of a parameter; a *turned* one is stepped there (`frame.py`, `turned.py`). Of bases, a block is b neighbours of a side.
- *share*: what an engine has put of a parameter into a flat tensor of many parameters (`flat.py`).
- *plan*: what one step does to the elements of a tensor (`plan.py`): a *variant* (plain, accumulating, refreshing) and its numbers.
- *bucket*: local tensors of one kind, which a backend takes together (`gather.py`). *Backend*: what carries plans out (`backends/`).
- *block*: 32 elements that share a scale in 8 bits (`rounding.py`). *Tile*: the elements that a kernel works on at once.

`update.py` is the paper's recurrence, `reference.py` the tests' oracle in float64, `anon.py` torch's contract.
"""

from anon_dist.optim.anon import Anon
from anon_dist.optim.groups import param_groups
from anon_dist.optim.reference import ReferenceAnon
from anon_dist.optim.state import STATE_KEYS

__all__ = ["STATE_KEYS", "Anon", "ReferenceAnon", "param_groups"]
