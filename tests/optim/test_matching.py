"""The learning rate across γ, against the steps that Anon takes."""

import json
import math

import pytest
import torch

from anon_dist.optim import Anon, param_groups
from anon_dist.optim.matching import Spectra, Spectrum, matched

GAMMAS = (-1.0, -0.5, 0.0, 0.5, 1.5, 2.0)


def rms(x):
    return math.sqrt(float(x.double().square().mean()))


@pytest.fixture(scope="module")
def moments():
    """σ and m̂ of heavy tails, over eight decades."""
    torch.manual_seed(0)
    sigma = torch.randn(50_000).mul(3).exp() * 1e-6
    m = sigma.sqrt() * torch.randn(50_000) * torch.randn(50_000).exp()
    m[::7] = 0.0
    return sigma, m


@pytest.fixture(scope="module")
def spectrum(moments):
    found, other = Spectrum(), Spectrum()
    for i, (s, m) in enumerate(zip(*(x.split(12_345) for x in moments), strict=True)):
        (found, other)[i % 2].add(s, m)
    found.merge(Spectrum.from_json(other.to_json()))
    return found


@pytest.mark.parametrize("gamma", [*GAMMAS, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0, 0.1])
def test_a_spectrum_knows_the_rms_of_the_update_at_any_gamma(gamma, clip, moments, spectrum):
    sigma, m = (x.double() for x in moments)

    def update(gamma, clip):
        u = sigma ** (-gamma / 2) * m
        return u if clip is None else u.clamp(-clip, clip)

    assert spectrum.rms(gamma, clip) == pytest.approx(rms(update(gamma, clip)), rel=0.02)
    f = spectrum.lr_factor(gamma, clip)
    scaled = f * update(gamma, None if clip is None else clip / f)
    assert rms(scaled) == pytest.approx(rms(update(1.0, clip)), rel=0.02)


def test_without_momenta_noise_is_assumed(moments):
    sigma = moments[0].double()
    spectrum = Spectrum()
    spectrum.add(sigma, sigma.sqrt())
    for gamma in GAMMAS:
        expected = float(sigma.pow(1.0 - gamma).mean()) ** -0.5
        assert spectrum.lr_factor(gamma) == pytest.approx(expected, rel=0.02)


def test_a_spectrum_of_nothing_has_no_factor():
    spectrum = Spectrum()
    assert spectrum.rms(1.0) == 0.0
    spectrum.add(torch.ones(3), torch.zeros(3))
    assert spectrum.elements == 3.0
    with pytest.raises(ValueError, match="take some steps first"):
        spectrum.lr_factor(0.5)


# -- against Anon -----------------------------------------------------------------------------------------------------

STEPS, WATCHED, LR, BETA1 = 300, 40, 1e-3, 0.9


def train(gamma, factor=1.0, clip=None):
    """Gradients of many scales, noisy.

    Returns:
        The root mean square of the changes of θ in the last steps, and the spectrum there.
    """
    generator = torch.Generator().manual_seed(1)
    scales = [10.0 ** torch.empty(80, 60).uniform_(-4 + i, -2 + i, generator=generator) for i in range(2)]
    params = [torch.nn.Parameter(torch.zeros(80, 60)) for _ in scales]
    clip = None if clip is None else clip / factor
    optimizer = Anon(params, lr=LR * factor, betas=(BETA1, 0.99), gamma=gamma, update_clip=clip, hold_silent=gamma < 0)
    squares, spectrum = 0.0, Spectrum()
    for t in range(1, STEPS + 1):
        for p, scale in zip(params, scales, strict=True):
            p.grad = (torch.randn(80, 60, generator=generator) + 0.3) * scale
        before = [p.detach().clone() for p in params]
        optimizer.step()
        if t > STEPS - WATCHED:
            squares += sum(float((p - b).double().square().mean()) for p, b in zip(params, before, strict=True))
            if t % 10 == 0:
                for p in params:
                    state = optimizer.state[p]
                    spectrum.add(state["precond"] ** -2, state["exp_avg"] / (1 - BETA1**t))
    return math.sqrt(squares / WATCHED / len(params)), spectrum


@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_of_anon_keep_their_rms(clip):
    wanted, spectrum = train(1.0, clip=clip)
    for gamma in (-1.0, 0.0, 0.5, 2.0):
        factor = spectrum.lr_factor(gamma, clip)
        assert not 0.2 < factor < 5.0, "a factor near 1 would show nothing"
        # γ = -1, unclipped, averages 1 / σ: 12% off while there are 128 gradients in σ; the others are within 5%.
        assert train(gamma, factor, clip)[0] == pytest.approx(wanted, rel=0.15 if gamma < 0 else 0.05), gamma


class Two(torch.nn.Module):
    """Two parameters whose gradients have other scales."""

    def __init__(self):
        super().__init__()
        self.small, self.large = (torch.nn.Parameter(torch.zeros(300, 100)) for _ in range(2))


def steps_of(model, optimizer):
    """Root mean square of each parameter's last step of 40, on noise; decay is looked at apart."""
    before = {}
    for t in range(40):
        for i, (name, p) in enumerate(model.named_parameters()):
            scale = 10.0 ** (3 * i - 4) * torch.logspace(-2, 0, p.numel()).view_as(p)
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
            before[name] = p.detach().clone()
        optimizer.step()
    return {name: rms(p.detach() - before[name]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("clip", [None, 1.0])
def test_each_group_is_matched_by_its_own_parameters(clip):
    """With one factor for both, the steps of one would be some 1000 times too small."""
    hyper = {"betas": (0.9, 0.95), "refresh_ratio": 1.1, "beta3": 0.8}
    plain = Two()
    reference = Anon(param_groups(plain, 0.1), lr=1e-3, update_clip=clip, **hyper)
    expected = steps_of(plain, reference)
    by_name = {}
    for name, p in plain.named_parameters():
        by_name[name], state = Spectrum(), reference.state[p]
        by_name[name].add(state["precond"].double() ** -2, state["exp_avg"] / (1 - 0.9**40))
    model = Two()
    groups = param_groups(model, 0.1, gamma={"small": 0.0, "large": 0.0})
    groups = matched(groups, model, Spectra(by_name), lr=1e-3, update_clip=clip)
    assert [g["lr"] * g["weight_decay"] for g in groups] == pytest.approx([1e-4] * 2)
    assert [g["lr"] * (g["update_clip"] or 0.0) for g in groups] == pytest.approx([1e-3 * (clip or 0.0)] * 2)
    assert groups[0]["lr"] / groups[1]["lr"] > 100  # 10^3: the unit of a gradient
    assert steps_of(model, Anon(groups, **hyper)) == pytest.approx(expected, rel=0.15)
    with pytest.raises(
        ValueError, match="small was measured with nothing turned into a basis of its own, and columns of 60 is here"
    ):
        matched(param_groups(model), model, Spectra(by_name), lr=1e-3, basis="columns", basis_block=60)
    with pytest.raises(ValueError, match="no spectrum of parameter 'large'"):
        matched(groups, model, Spectra({"small": by_name["small"]}), lr=1e-3)
    with pytest.raises(ValueError, match="says nothing: no gradient was seen"):
        matched(groups, model, Spectra({**by_name, "large": Spectrum()}), lr=1e-3)


def test_what_is_matched_in_a_basis_was_measured_in_it():
    """γ = 0 and γ = 1 make steps of one size there, however the basis mixes columns of other scales."""
    hyper = {"betas": (0.9, 0.95), "refresh_ratio": 1.1, "beta3": 0.8, "basis": "columns", "basis_block": 64}
    plain, model = Two(), Two()
    reference = Anon(param_groups(plain, 0.0), lr=1e-3, **hyper)
    expected = steps_of(plain, reference)
    reference.settle()
    by_name, frames = {}, dict.fromkeys(("small", "large"), "columns of 64")
    for name, p in plain.named_parameters():
        by_name[name], state = Spectrum(), reference.state[p]
        by_name[name].add(state["precond"].double() ** -2, state["exp_avg"] / (1 - 0.9**40))
    spectra = Spectra.from_json(json.loads(json.dumps(Spectra(by_name, frames=frames).to_json())))
    groups = param_groups(model, 0.0, gamma={"small": 0.0, "large": 0.0}, basis="columns")
    groups = matched(groups, model, spectra, lr=1e-3, basis_block=64)
    assert steps_of(model, Anon(groups, **hyper)) == pytest.approx(expected, rel=0.2)
    with pytest.raises(ValueError, match=r"measured with columns of 64 turned .* and nothing is here"):
        matched(param_groups(model, 0.0), model, spectra, lr=1e-3)
