"""The learning rate across γ: the factor that keeps the size of a step.

A step moves an element by η · u with u = clip(v · m̂), and v = σ^(−γ/2) with σ the debiased second moment. Its root mean square over N
elements is η · R(γ, c), where c is the clip and

    R(γ, c)² = 1/N Σ min(m̂² σ^(−γ), c²)

R's unit is that of the gradient to the power 1 − γ: a learning rate says nothing before γ is known. The factor f that keeps what γ = 1
does is therefore that of the whole unit: η → f η, c → c / f (an element moves by at most η c, as before), λ → λ / f (η λ stays), and

    f · R(γ, c / f) = R(1, c)

Without a clip f = R(1) / R(γ). With one, the left side is √(1/N Σ min(f² m̂² σ^(−γ), c²)), which grows with f, so that bisection finds it.

All of it follows from how σ and m̂² are distributed together, so one histogram of them, a `Spectrum`, serves every γ and c, and adds up over
tensors, steps and ranks. Where m̂ is not known, gradients that are mostly noise have E[m̂²] = σ (1 − β1) / (1 + β1); the constant cancels
without a clip, and f = E[σ^(1−γ)]^(−1/2). Param groups of different γ need a factor each, so `Spectra` has a histogram per parameter.

It is a snapshot: gradients shrink and spread in training, and steps of γ ≠ 1 with them. And v of another γ averages σ^γ over refreshes,
where γ = 1 averages σ: while σ is made of few gradients, in the first hundred steps or so, steps at γ < 0 come out smaller than this
says (by a third at γ = −1, β3 = 0.8 and 8 gradients between refreshes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anon_dist.optim import frame

BINS_PER_OCTAVE = 8
LEAST, MOST = -256, 128
"""log2 of the smallest and largest σ and m̂² told apart. float32's squares below 2^-149 are 0, but moments may be computed in float64."""

_SIDE = (MOST - LEAST) * BINS_PER_OCTAVE
_HALVINGS = 80


class Spectrum:
    """A histogram of elements by (log2 σ, log2 m̂²), in bins of 1/8 octave: exact sums to about 0.1% at |γ| ≤ 2."""

    def __init__(self) -> None:
        self._counts: dict[int, float] = {}
        self.elements = 0.0
        """All of them; those with m̂ = 0, which move nothing, are counted here alone."""

    def add(self, sigma: Tensor, m_hat: Tensor) -> None:
        """Count elements.

        Args:
            sigma: debiased second moments σ > 0 with ε in them; any shape and floating dtype.
            m_hat: debiased mean gradients m̂, of the same shape.
        """
        sigma, squares = sigma.detach().double().flatten(), m_hat.detach().double().flatten().square()
        self.elements += squares.numel()
        moving = squares > 0.0
        indices = _bin(sigma[moving]) * _SIDE + _bin(squares[moving])
        for index, count in zip(*(t.tolist() for t in indices.unique(return_counts=True)), strict=True):
            self._counts[index] = self._counts.get(index, 0.0) + count

    def merge(self, other: Spectrum) -> None:
        """Count the other's elements too."""
        self.elements += other.elements
        for index, count in other._counts.items():
            self._counts[index] = self._counts.get(index, 0.0) + count

    def rms(self, gamma: float, clip: float | None = None) -> float:
        """R(γ, c): the root mean square of clip(v · m̂) at this γ; 0.0 if nothing moves."""
        return self._rms(self._log_squares(gamma), clip)

    def lr_factor(self, gamma: float, clip: float | None = None, reference: float = 1.0) -> float:
        """f: what to multiply the learning rate of γ = `reference` with at this γ, so that steps keep their root mean square.

        Args:
            clip: `update_clip` at γ = `reference`; at this γ it is to be clip / f.

        Raises:
            ValueError: no element moves.
        """
        target, logs = self.rms(reference, clip), self._log_squares(gamma)
        if target == 0.0:
            raise ValueError("Spectrum: no element has a gradient: take some steps first")
        if gamma == reference:
            return 1.0
        if clip is None:
            return target / self._rms(logs, None)
        low, high = -512.0, 512.0  # log2 f
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            below = self._rms(logs + 2.0 * middle, clip) < target
            low, high = (middle, high) if below else (low, middle)
        return math.exp2(low)

    def _log_squares(self, gamma: float) -> Tensor:
        """log2 of m̂² σ^(−γ), by bin; float64."""
        index = torch.tensor(list(self._counts), dtype=torch.int64)
        return _centre(index % _SIDE) - gamma * _centre(index // _SIDE)

    def _rms(self, logs: Tensor, clip: float | None) -> float:
        if not self._counts:
            return 0.0
        if clip is not None:
            logs = logs.clamp(max=2.0 * math.log2(clip))
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
        return math.sqrt(float((counts * logs.exp2()).sum()) / self.elements)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"elements": self.elements, "bins_per_octave": BINS_PER_OCTAVE, "counts": self._counts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Spectrum:
        """What `to_json` gave.

        Raises:
            ValueError: it was made with other bins.
        """
        if value["bins_per_octave"] != BINS_PER_OCTAVE:
            raise ValueError(
                f"a spectrum of {value['bins_per_octave']} bins per octave; this version's has {BINS_PER_OCTAVE}"
            )
        made = cls()
        made.elements = value["elements"]
        made._counts = {int(index): count for index, count in value["counts"].items()}
        return made


class Spectra:
    """A spectrum for each parameter name; or one for all parameters, whatever their names, as older files have it.

    Attributes:
        frames: of parameters that were measured in a basis of their own, which sides of it, see `frame_of`.
    """

    def __init__(
        self,
        by_name: Mapping[str, Spectrum] | None = None,
        of_all: Spectrum | None = None,
        frames: Mapping[str, str] | None = None,
    ) -> None:
        self._by_name, self._of_all, self.frames = dict(by_name or {}), of_all, dict(frames or {})

    def of(self, names: Iterable[str]) -> Spectrum:
        """The parameters' together.

        Raises:
            KeyError: naming the first that there is none of.
        """
        return self._of_all or _merged(self._by_name[name] for name in names)

    def whole(self) -> Spectrum:
        """All parameters' together."""
        return self._of_all or _merged(self._by_name.values())

    def merge(self, other: Spectra) -> None:
        """Count the other's elements too; both by name."""
        for name, spectrum in other._by_name.items():
            self._by_name.setdefault(name, Spectrum()).merge(spectrum)
        self.frames |= other.frames

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        if self._of_all:
            return self._of_all.to_json()
        found: dict[str, Any] = {"parameters": {name: spectrum.to_json() for name, spectrum in self._by_name.items()}}
        return {**found, "frames": self.frames} if self.frames else found

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Spectra:
        """What `to_json`, or a single spectrum's, gave.

        Raises:
            ValueError: it was made with other bins.
            KeyError: it is something else.
        """
        if "parameters" not in value:
            return cls(of_all=Spectrum.from_json(value))
        by_name = {name: Spectrum.from_json(x) for name, x in value["parameters"].items()}
        return cls(by_name, frames=value.get("frames"))


def frame_of(p: Tensor, basis: str | None, block: int) -> str:
    """The frame in which a parameter's update is made: its turned sides and their blocks, "columns of 128"; "" if none is turned."""
    wanted = {"basis": basis}
    return ", ".join(f"{side} of {min(block, frame.length(p, side))}" for side in frame.sides(p, wanted))


def matched(
    groups: Sequence[dict[str, Any]],
    model: nn.Module,
    spectra: Spectra,
    *,
    lr: float,
    update_clip: float | None = None,
    gamma: float = 1.0,
    basis: str | None = None,
    basis_block: int = 128,
) -> list[dict[str, Any]]:
    """Param groups for `Anon` whose lr, update_clip and weight_decay are meant for γ = 1: multiplied, in each group, for its own γ.

        groups = param_groups(model, 0.1, gamma={"*wte*": 0.5})
        optimizer = Anon(matched(groups, model, spectra, lr=1e-3, update_clip=1.0))

    Args:
        groups: as `param_groups` makes them.
        lr, update_clip, gamma, basis, basis_block: of groups that do not say. What is matched is the update as it is
            clipped, in the basis: spectra must have been measured in it.

    Raises:
        ValueError: a spectrum is missing, was measured in another basis, or says nothing, since no gradient was seen.
    """
    names = {p: name for name, p in model.named_parameters()}
    made = []
    for group in groups:
        spectrum = group_spectrum(spectra, {"basis": basis, "basis_block": basis_block, **group}, names)
        clip = group.get("update_clip", update_clip)
        f = spectrum.lr_factor(group.get("gamma", gamma), clip)
        values = {"lr": group.get("lr", lr) * f, "update_clip": clip and clip / f}
        made.append({**group, **values, "weight_decay": group.get("weight_decay", 0.0) / f})
    return made


def group_spectrum(spectra: Spectra, group: Mapping[str, Any], names_of: Mapping[Any, str]) -> Spectrum:
    """The spectrum of a param group's parameters.

    Args:
        names_of: names of the parameters.

    Raises:
        ValueError: there is none of a parameter, it was measured in another basis, or no gradient was seen in any.
    """
    names = [names_of[p] for p in group["params"]]
    try:
        spectrum = spectra.of(names)
    except KeyError as error:
        raise ValueError(f"there is no spectrum of parameter {error}: it was measured on another model") from None
    for p, name in zip(group["params"], names, strict=True):
        here, there = frame_of(p, group.get("basis"), group.get("basis_block", 128)), spectra.frames.get(name, "")
        if here != there:
            raise ValueError(
                f"the spectrum of {name} was measured with {there or 'nothing'} turned into a basis of its own, and {here or 'nothing'} is "
                "here: measure it on a checkpoint of Anon with the same basis and basis_block"
            )
    if spectrum.rms(1.0) == 0.0:
        raise ValueError(f"the spectrum of {', '.join(names[:3])}, … says nothing: no gradient was seen there")
    return spectrum


def _merged(spectra: Iterable[Spectrum]) -> Spectrum:
    total = Spectrum()
    for spectrum in spectra:
        total.merge(spectrum)
    return total


def _bin(positive: Tensor) -> Tensor:
    return ((positive.log2() - LEAST) * BINS_PER_OCTAVE).floor().clamp(0, _SIDE - 1).long()


def _centre(index: Tensor) -> Tensor:
    return LEAST + (index.double() + 0.5) / BINS_PER_OCTAVE
