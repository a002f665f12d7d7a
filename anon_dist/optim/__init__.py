"""The Anon optimizer (arXiv 2605.02317).

The words, each with one meaning.

Of every parameter:

- *role*: what a tensor is in a step: θ, g, m, s or v. `plan.ROLES` says what each of them is.
- *preconditioner*: v = d^(−1/2), by which each element of the mean gradient m is multiplied. d is a mean of σ^γ over refreshes.
- *second moment*: s, the mean of g² since the last refresh; σ is s freed of its bias, plus ε.
- *refresh*: the step that makes v anew from s, and starts s from 0. Between refreshes v is constant.
- *age*: how many steps s holds. *Window*: the last steps before a refresh, in which alone s is read and written.
- *schedule*: at which steps refreshes lie (`schedule.py`). A *phase* of it: a stretch of steps with the same ρ, β2 and window.
- *regime*: what a param group's state was made with, and what follows for the next step (`regime.py`); its *history* lies in the group.
- *γ in force*: the one that a group's preconditioners are of. A *pending* γ was set in the group and waits for a refresh, in which it comes
  into force. *γ°*: the one that a preconditioner was made with. To *convert* it is to bring it from γ° to another γ: d^(γ/γ°).
- *foremost*: the parameters of a group that have taken the most steps.
- *hidden*: a parameter that has state, and that its group does not show at the moment (`hidden.py`).

Of matrices, with `basis=…`:

- *matrix*: a parameter of two or more dimensions. Its first dimension makes the rows, all others together make the columns.
- *side*: the columns or the rows of a matrix. A side is cut into *blocks* of b neighbours. b is the *block size*: `basis_block`, or less
  where the side is shorter.
- *basis*: of a side, an orthogonal b × b matrix for each block (`basis.py`).
- *turned*: a matrix is turned if one of its sides, or both, have a basis. To *turn* a tensor is to multiply it by the bases.
  m, s and v of a turned matrix are those of its turned gradient; θ is not turned.
- *frame*: the bases of a turned matrix together; and the coordinates in which its update is computed (`frame.py`).
- *covariance*: of a side, a b × b matrix for each block. C, in the state, is the mean of the momentum's covariances at the refreshes.
- *renewal*: what follows a step that has refreshed a turned matrix. C takes in the momentum's covariance, each basis moves towards the
  eigenvectors of C, and m and v are turned along (`turned.py`).

Of the program:

- *flat tensor*: a tensor of an engine's with parts of many parameters in it, one after the other. *Share*: what lies in it of one
  parameter (`flat.py`).
- *plan*: what one step does to the elements of a tensor (`plan.py`): a *variant* (plain, accumulating, refreshing) and its numbers.
- *bucket*: local tensors of one kind, which a backend takes together (`gather.py`). *Backend*: what carries plans out (`backends/`).
- *8-bit block*: 32 elements that share a scale (`rounding.py`). *Tile*: the elements that a kernel works on at once.

`update.py` is the paper's recurrence, `reference.py` the tests' oracle in float64, `anon.py` torch's contract.
"""

from anon_dist.optim.anon import Anon
from anon_dist.optim.groups import param_groups
from anon_dist.optim.reference import ReferenceAnon
from anon_dist.optim.state import STATE_KEYS

__all__ = ["STATE_KEYS", "Anon", "ReferenceAnon", "param_groups"]
