"""Start values that depend on text, set from one pass of the teacher (modes.calibrate), without any training. A switch per kind:

    fit_share    gated, added: the least-squares mix of the window's and the linear branch's output to the teacher's, per query head, and the size of
                 a branch that has a number for it. joint: the share of the normaliser, off a grid, whose output is nearest the teacher's
                 (off: a tenth)
    fit_map      Hedgehog, LLN: how sharp the map is, off a grid, so that such a mix is nearest the teacher's output. Codebook: k-means of its keys
    fit_concentration   in the place of that: Hedgehog as concentrated as the teacher (entropy over older keys), LLN by its own moment matching
    fit_decay    each head fades as fast as the teacher's attention beyond the window does

What helps is on (docs/results.md, "Calibration before training"); the last two did not (docs/log.md, 2026-11-27). Values are functions of the call
alone, without random numbers, and are parameters or buffers, so that a saved student is the calibrated one. A cell whose gates have been trained is
left alone. Nothing is fitted to encoders, which have nothing older than a window.

Key: as in base.py; N rows that count, Q queries looked at, J tokens that are read, F features, S codewords.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.combine import TINY, join
from subquad.linearize.mixers.gates import InputGate
from subquad.linearize.mixers.local import Local
from subquad.linearize.mixers.normalisers import Sums
from subquad.linearize.mixers.stream import Stream, positions, real, seen

QUERIES = 256  # of a call, evenly spaced: their weights over all tokens are written out

TENTH = 0.1  # share of the joint normaliser where it is not fitted
LEAST, MOST = 0.02, 0.9  # of a fitted share: a gate at 0 or 1 would give its branch, or the window, no gradient
SHARES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)  # of the joint normaliser
SHARPER = tuple(2.0 ** (i / 2) for i in range(-6, 7))
RATES = torch.logspace(-4, 0, 49)  # per token; half-lives of 7,000 tokens to one
MOMENT_A, MOMENT_B = 0.14855178, -0.35487039  # var(log weight) = a (alpha^2 var q + beta^2 var k) + b: third-party code of LLN (SEEDS A15)
KMEANS_STEPS = 10


@torch.no_grad()
def fit_before(cell, call: AttentionCall) -> None:
    """Maps and decays of a cell that has not been trained: what comes before the read."""
    sample = look(cell, call) if fresh(cell) else None
    if sample is None:
        return
    p, fit = cell.pieces, cell.rows.feature_map.fit
    if fit and not cell.rows.container.slots and cell.map_k.untouched():
        if p["fit_concentration"] and fit in CONCENTRATION:
            CONCENTRATION[fit](cell, call, sample)
        elif p["fit_map"]:
            FITS[fit](cell, call, sample)
    if p["fit_decay"] and cell.rows.decay.fits:
        cell.decay.start_at(fade(sample))


def fresh(cell) -> bool:
    """No step of training has been taken: the gates of mix and decay start with weight zero and get gradients at once."""
    tops = [top for top in (getattr(cell, "mix", None), cell.decay) if top is not None]
    return not any(bool(gate.weight.any()) for top in tops for gate in top.modules() if isinstance(gate, InputGate))


# --- what the teacher does with older tokens --------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """The teacher's weights of some queries, beside which tokens the linear branch has when they read."""

    at_Q: Tensor  # their rows
    weights_BQGRJ: Tensor  # over all tokens; rows of filler are 0
    older_BQJ: Tensor
    age_QJ: Tensor  # rows since j was written

    @property
    def mass_BQGR(self) -> Tensor:
        """Of the older tokens: how much a query's row counts."""
        return (self.weights_BQGRJ * self.older_BQJ[:, :, None, None]).sum(-1)

    def outputs(self, v_BTGV: Tensor) -> tuple[Tensor, Tensor]:
        """([B, Q, G, R, V] of the teacher, of its softmax over what is not older)."""
        exact, near = (torch.einsum("bqgrj,bjgv->bqgrv", x, v_BTGV.float()) for x in (self.weights_BQGRJ, self.near))
        sink = (1 - self.weights_BQGRJ.sum(-1)).clamp_min(0)  # what a learned sink takes
        return exact, near / (self.near.sum(-1) + sink).clamp_min(TINY).unsqueeze(-1)

    @property
    def near(self) -> Tensor:
        return self.weights_BQGRJ * ~self.older_BQJ[:, :, None, None]


def look(cell, call: AttentionCall) -> Sample | None:
    """None where no query has older tokens."""
    (B, T), device = call.k_BTGK.shape[:2], call.k_BTGK.device
    window, sinks = (cell.window, cell.sinks) if cell.rows.combine.window else (0, 0)
    first = window + sinks
    if first >= T:
        return None
    at = torch.linspace(first, T - 1, min(T - first, max(QUERIES // B, 1)), device=device).round().long()
    j = torch.arange(T, device=device)
    age, on = at[:, None] - window - j, real(call)
    older = ((age >= 0) & (j >= sinks)) & on[:, at, None]
    return Sample(at, teacher_weights(call, at) * on[:, at, None, None, None], older, age) if bool(older.any()) else None


def teacher_weights(call: AttentionCall, at_Q: Tensor) -> Tensor:
    """[B, Q, G, R, J] fp32: the teacher's softmax of the queries in rows at_Q."""
    scores = torch.einsum("bqgrk,bjgk->bqgrj", call.q_BTGRK[:, at_Q].float(), call.k_BTGK.float()) * call.scale
    scores = scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)
    distance = at_Q[:, None] - torch.arange(scores.shape[-1], device=scores.device)
    seen = (distance >= 0) if call.reach is None else (distance >= 0) & (distance < call.reach)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))  # filler comes after the real tokens, which do not look ahead
    if call.sink_logit_GR is None:
        return scores.softmax(-1)
    sink = call.sink_logit_GR.float().expand(*scores.shape[:2], -1, -1).unsqueeze(-1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


# --- decay --------------------------------------------------------------------------------------------------------------------------------------


def fade(sample: Sample) -> Tensor:
    """[G]: log decay <= 0 per token at which even weights e^(log x age) over the older tokens have the teacher's mean age, by the grid of RATES."""
    older, age = sample.older_BQJ.float(), sample.age_QJ.clamp_min(0).float()
    mass_BQG = sample.mass_BQGR.sum(-1)
    total_G = mass_BQG.sum((0, 1))
    wanted = torch.einsum("bqgrj,bqj,qj->g", sample.weights_BQGRJ, older, age) / total_G.clamp_min(TINY)
    wanted = wanted.masked_fill(total_G == 0, float(age.max()))  # a head that does not look there: the slowest
    found = []
    for rate in RATES.tolist():
        faded = (-rate * age).exp() * older
        mean = (faded * age).sum(-1) / faded.sum(-1).clamp_min(TINY)  # [B, Q]
        found.append((mass_BQG * mean.unsqueeze(-1)).sum((0, 1)) / total_G.clamp_min(TINY))
    nearest = (torch.stack(found) - wanted).abs().argmin(0)
    return -RATES.to(nearest.device)[nearest]


# --- maps ---------------------------------------------------------------------------------------------------------------------------------------


def sharpness(cell, call: AttentionCall, sample: Sample) -> None:
    """Scale W (LLN: alpha) on both sides by the number per key/value head, off a grid, with which the least-squares mix of the window and a
    linear branch that divides by its sum is nearest the teacher's output.

    A joint normaliser gives the branch more of a sharp query's output, which that mix does not see: there at most twice as sharp (docs/log.md).
    """
    joint = cell.rows.combine.joint
    if not (joint or cell.rows.normaliser.divides):
        return
    grid = [by for by in SHARPER if by <= 2] if joint else SHARPER
    exact, window = sample.outputs(call.v_BTGV)
    on, v, errors = sample.older_BQJ.any(-1), call.v_BTGV.float(), []
    for by in grid:
        weights = linear_weights(cell, call, sample, by)
        linear = torch.einsum("bqgrj,bjgv->bqgrv", weights, v) / weights.sum(-1, keepdim=True).clamp_min(TINY)
        errors.append(mix_of(window[on], linear[on], exact[on], adds=cell.rows.combine.adds).error_GR.sum(-1))
    _sharpen(cell, torch.tensor(grid, device=v.device)[torch.stack(errors).argmin(0)])


def concentration(cell, call: AttentionCall, sample: Sample) -> None:
    """The same so that the linear weights over the older tokens have the entropy of the teacher's."""
    wanted = _entropy(sample.weights_BQGRJ * sample.older_BQJ[:, :, None, None], sample.mass_BQGR)
    found = torch.stack([_entropy(linear_weights(cell, call, sample, by), sample.mass_BQGR) for by in SHARPER])
    _sharpen(cell, torch.tensor(SHARPER, device=found.device)[(found - wanted).abs().argmin(0)])


def _sharpen(cell, by_G: Tensor) -> None:
    cell.map_q.sharpen(by_G[:, None].expand(-1, cell.shape.groups))
    cell.map_k.sharpen(by_G)


def linear_weights(cell, call: AttentionCall, sample: Sample, sharper: float = 1.0) -> Tensor:
    """[B, Q, G, R, J] up to a factor per query, 0 where j is not older: phi(sharper q).phi(sharper k), which is phi of a sharper W."""
    position, at = positions(call, seen(call)), sample.at_Q
    q = cell.map_q(cell.asked(call)[:, at].float() * sharper, position[:, at])
    k = cell.map_k(cell.keys(call).float() * sharper, position)
    if "q" in cell.rows.feature_map.exponential:
        q = (q - q.amax(-1, keepdim=True)).exp()
    if "k" in cell.rows.feature_map.exponential:
        k = (k - k.amax((1, 3), keepdim=True)).exp()
    return torch.einsum("bqgrf,bjgf->bqgrj", q, k) * sample.older_BQJ[:, :, None, None]


def _entropy(weights_BQGRJ: Tensor, mass_BQGR: Tensor) -> Tensor:
    """[G]: mean entropy of the rows, each by what its older tokens weigh for the teacher."""
    p = weights_BQGRJ / weights_BQGRJ.sum(-1, keepdim=True).clamp_min(TINY)
    entropy = -(p * p.clamp_min(TINY).log()).sum(-1)
    return (entropy * mass_BQGR).sum((0, 1, 3)) / mass_BQGR.sum((0, 1, 3)).clamp_min(TINY)


def moments(cell, call: AttentionCall, sample: Sample) -> None:
    """LLN's moment matching (SEEDS A15): var(log weight) = a (alpha^2 var q + beta^2 var k) + b is the variance of the teacher's scores, both sides alike.

    The paper takes var q var k / K for it, of whole layers; here per query head; keys, shared by a group, get the group's mean.
    """
    on = real(call)
    var_q = cell.asked(call).float()[on].var((0, 3), unbiased=False)  # [G, R]
    var_k = cell.keys(call).float()[on].var((0, 2), unbiased=False)  # [G]
    scores = var_q * var_k[:, None]
    each = (scores - MOMENT_B) / (2 * MOMENT_A)
    for side, wanted, found in ((cell.map_q, each, var_q), (cell.map_k, each.mean(1), var_k)):
        side.alpha.copy_((wanted / found.clamp_min(TINY)).sqrt().unsqueeze(-1) / side.scale)


def codebook(cell, call: AttentionCall, sample: Sample) -> None:
    """Codewords are the k-means of the teacher's keys (SEEDS A19), from keys evenly spaced in the text."""
    keys = cell.keys(call).float()[real(call)].transpose(0, 1)  # [G, N, K]
    words = keys[:, torch.linspace(0, keys.shape[1] - 1, cell.map_k.count, device=keys.device).round().long()]
    for _ in range(KMEANS_STEPS):
        nearest = torch.cdist(keys, words).argmin(-1)
        one = torch.nn.functional.one_hot(nearest, words.shape[1]).float()  # [G, N, S]
        count = one.sum(1).unsqueeze(-1)
        words = torch.where(count > 0, one.transpose(1, 2) @ keys / count.clamp_min(1), words)
    cell.map_k.codewords.copy_(words)


FITS = {"sharpness": sharpness, "log_normal": sharpness, "codebook": codebook}
CONCENTRATION = {"sharpness": concentration, "log_normal": moments}

# --- share --------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Mix:
    """The linear branch's share g and size c (None: it has no number for it), and the squared error that is left; each [G, R]."""

    share_GR: Tensor
    size_GR: Tensor | None
    error_GR: Tensor


def mix_of(window: Tensor, linear: Tensor, exact: Tensor, adds: bool = False, sized: bool = False) -> Mix:
    """The least-squares fit of exact by (1 - g) window + g c linear, or by window + g c linear where the branch is added; c = 1 unless sized.
    All [N, G, R, V] fp32.

    g stays between LEAST and MOST, and c large enough that g c linear is a tenth of g window: a branch that is of no use yet can still learn.
    """
    ww, wl, ll, we, le, ee = (
        (a * b).sum((0, 3))
        for a, b in ((window, window), (window, linear), (linear, linear), (window, exact), (linear, exact), (exact, exact))
    )
    size = None
    if adds:
        share = (le - wl) / ll.clamp_min(TINY)
    elif sized:
        share = 1 - (we * ll - le * wl) / (ww * ll - wl.square()).clamp_min(TINY)
    else:
        share = (le - wl - we + ww) / (ll - 2 * wl + ww).clamp_min(TINY)
    share = share.clamp(LEAST, MOST)
    of_window = torch.ones_like(share) if adds else 1 - share
    if sized:
        size = (le - of_window * wl) / (share * ll).clamp_min(TINY)
        size = torch.maximum(size, 0.1 * (ww / ll.clamp_min(TINY)).sqrt())
    part = share if size is None else share * size
    error = ee - 2 * (of_window * we + part * le) + of_window.square() * ww + 2 * of_window * part * wl + part.square() * ll
    return Mix(share, size, error)


@torch.no_grad()
def fit_mix(cell, call: AttentionCall, window: Tensor, linear: Tensor, on_BT: Tensor) -> None:
    """Each query head's share of the linear branch's output, and its size. Outputs are [B, T, G, R, V] fp32."""
    on = on_BT.expand(window.shape[:2])
    if not cell.pieces["fit_share"] or call.exact_BTGRV is None or not bool(on.any()) or not fresh(cell):
        return
    size = cell.size
    found = mix_of(window[on], linear[on], call.exact_BTGRV[on].float(), adds=cell.rows.combine.adds, sized=size is not None)
    cell.mix.bias.copy_(torch.logit(found.share_GR).flatten())
    if size is not None:
        size.mul_(found.size_GR.view(*found.size_GR.shape, *(1,) * (size.dim() - 2)))


@torch.no_grad()
def fit_joint(cell, call: AttentionCall, local: Local, stream: Stream, sums: Sums, log_scale: Tensor | float) -> None:
    """Each query head's log weight of the linear branch's sums under a joint normaliser, so that the branch holds a certain share of it, in the
    geometric mean over tokens: the one of SHARES whose output is nearest the teacher's, a tenth where that is not to be fitted.

    The window's log sum is 4 to 8 nats, differs by head, and an untrained map's sums lie far below it: from one constant for all heads the
    linear branch gets next to no gradient where it is needed most.
    """
    on, exact = stream.on_BT.expand(sums.total.shape[:2]), call.exact_BTGRV
    if cell.rows.combine.gate != "mix" or not bool(on.any()) or not fresh(cell):
        return
    ratio_BTGR = local.top + local.denominator.clamp_min(TINY).log() - sums.total.clamp_min(TINY).log() - log_scale
    mean_GR, shares = ratio_BTGR[on].mean(0), torch.tensor([TENTH], device=on.device)
    if cell.pieces["fit_share"] and exact is not None:
        shares = torch.tensor(SHARES, device=on.device)
        outs = (join(local, on, sums.y, sums.total, mean_GR + torch.logit(share) + log_scale) for share in shares)
        shares = shares[torch.stack([(out[on] - exact[on].float()).square().sum((0, 3)) for out in outs]).argmin(0)]
    cell.mix.bias.copy_((mean_GR + torch.logit(shares)).flatten())
