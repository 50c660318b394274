"""Start values that depend on text, set from one pass of the teacher (modes.calibrate), without any training. One function per value:

    share        joint: the branch holds a tenth of the normaliser. gated, added: the least-squares mix to the teacher's output, per query head
    decay        each head fades as fast as the teacher's attention beyond the window does
    map          hedgehog: as sharp as the teacher's softmax over the same keys. LLN: moment matching. codebook: k-means of the teacher's keys

What helps is measured in docs/results.md ("Calibration before training"). Values are functions of the call alone, without random numbers, and are
parameters or buffers, so that a saved student is the calibrated one. A cell whose gates have been trained is left alone.

Key: as in base.py; Q queries looked at, J tokens that are read, S codewords.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.gates import InputGate
from subquad.linearize.mixers.local import Local
from subquad.linearize.mixers.stream import positions, real, seen

TINY = torch.finfo(torch.float32).tiny
QUERIES = 256  # of a call, evenly spaced: their weights over all tokens are written out

START = 0.1  # share of the joint normaliser before any training
LEAST, MOST = 0.02, 0.9  # of a fitted share: a gate at 0 or 1 would give its branch, or the window, no gradient
RATES = torch.logspace(-4, 0, 49, dtype=torch.float64).float()  # per token; half-lives of 7,000 tokens to one
TEMPERATURES = 2.0 ** torch.linspace(-2, 2, 9)
MOMENT_A, MOMENT_B = 0.14855178, -0.35487039  # var(log weight) = a (alpha^2 var q + beta^2 var k) + b: the fit of LLN's third-party code (SEEDS A15)
KMEANS_STEPS = 10


@torch.no_grad()
def before_the_read(cell, call: AttentionCall) -> None:
    """Maps and decays of a cell that has not been trained."""
    if not fresh(cell):
        return
    sample = look(cell, call)
    if sample is None:
        return
    if cell.pieces["fit_map"] and not cell.rows.container.slots and cell.rows.feature_map.fit:
        FITS[cell.rows.feature_map.fit](cell, call, sample)
    if cell.pieces["fit_decay"] and hasattr(cell.decay, "start_at"):
        cell.decay.start_at(fade(sample))


def fresh(cell) -> bool:
    """No step of training has been taken: the gates of mix and decay start with weight zero and get gradients at once."""
    gates = [gate for name in ("mix", "decay") for gate in _modules(getattr(cell, name, None)) if isinstance(gate, InputGate)]
    return not any(bool(gate.weight.any()) for gate in gates)


def _modules(module) -> list:
    return [] if module is None else list(module.modules())


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
    mass = sample.mass_BQGR.sum(-1)  # [B, Q, G]
    wanted = torch.einsum("bqgrj,bqj,qj->g", sample.weights_BQGRJ, older, age) / mass.sum((0, 1)).clamp_min(TINY)
    found = []
    for rate in RATES.tolist():
        faded = (-rate * age).exp() * older
        mean = (faded * age).sum(-1) / faded.sum(-1).clamp_min(TINY)  # [B, Q]
        found.append((mass * mean.unsqueeze(-1)).sum((0, 1)) / mass.sum((0, 1)).clamp_min(TINY))
    nearest = (torch.stack(found) - wanted).abs().argmin(0)
    return -RATES.to(nearest.device)[nearest]


# --- maps ---------------------------------------------------------------------------------------------------------------------------------------


def temperature(cell, call: AttentionCall, sample: Sample) -> None:
    """Scale W so that the linear weights over the older tokens have the entropy of the teacher's; one number per key/value head, on both sides."""
    older, mass = sample.older_BQJ[:, :, None, None], sample.mass_BQGR
    wanted = _entropy(sample.weights_BQGRJ * older, mass)
    found = torch.stack([_entropy(linear_weights(cell, call, sample, float(t)) * older, mass) for t in TEMPERATURES])
    best_G = TEMPERATURES.to(found.device)[(found - wanted).abs().argmin(0)]
    cell.map_q.sharpen(best_G[:, None].expand(-1, call.q_BTGRK.shape[3]))
    cell.map_k.sharpen(best_G)


def linear_weights(cell, call: AttentionCall, sample: Sample, sharper: float = 1.0) -> Tensor:
    """[B, Q, G, R, J] up to a factor per query: phi(sharper q).phi(sharper k). Maps with a weight in front are linear there."""
    position, at = positions(call, seen(call)), sample.at_Q
    q = cell.map_q(cell.queries(call)[:, at].float() * sharper, position[:, at])
    k = cell.map_k(cell.keys(call).float() * sharper, position)
    if "q" in cell.rows.feature_map.exponential:
        q = (q - q.amax(-1, keepdim=True)).exp()
    if "k" in cell.rows.feature_map.exponential:
        k = (k - k.amax((1, 3), keepdim=True)).exp()
    return torch.einsum("bqgrf,bjgf->bqgrj", q, k)


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
    var_q = call.q_BTGRK.float()[on].var((0, 3), unbiased=False)  # [G, R]
    var_k = call.k_BTGK.float()[on].var((0, 2), unbiased=False)  # [G]
    scores = var_q * var_k[:, None] * (call.q_BTGRK.shape[-1] * call.scale**2)
    each = (scores - MOMENT_B) / (2 * MOMENT_A)
    for side, wanted, found in ((cell.map_q, each, var_q), (cell.map_k, each.mean(1), var_k)):
        side.alpha.copy_((wanted / found.clamp_min(TINY)).sqrt().unsqueeze(-1) / side.scale)


def codebook(cell, call: AttentionCall, sample: Sample) -> None:
    """Codewords are the k-means of the teacher's keys (SEEDS A19), from keys evenly spaced in the text."""
    if not cell.map_k.untouched():
        return
    keys = cell.keys(call).float()[real(call)].transpose(0, 1)  # [G, N, K]
    words = keys[:, torch.linspace(0, keys.shape[1] - 1, cell.map_k.count, device=keys.device).round().long()]
    for _ in range(KMEANS_STEPS):
        nearest = torch.cdist(keys, words).argmin(-1)
        one = torch.nn.functional.one_hot(nearest, words.shape[1]).float()  # [G, N, S]
        count = one.sum(1).unsqueeze(-1)
        words = torch.where(count > 0, one.transpose(1, 2) @ keys / count.clamp_min(1), words)
    cell.map_k.codewords.copy_(words)


FITS = {"temperature": temperature, "moments": moments, "codebook": codebook}

# --- share --------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def joint_share(mix: InputGate, local: Local, total_BTGR: Tensor, log_scale: Tensor | float) -> None:
    """Set each query head's log weight so that the linear branch holds the share START of the normaliser, in the geometric mean over tokens.

    The window's log sum is 4 to 8 nats, differs by head, and an untrained map's sums lie far below it: from one constant for all heads the
    linear branch gets next to no gradient where it is needed most. A gate that has been trained (weight not zero) is left alone.
    """
    seen_BT = local.left_BT
    if bool(mix.weight.any()) or not bool(seen_BT.any()):
        return
    ratio_BTGR = local.top + local.denominator.clamp_min(TINY).log() - total_BTGR.clamp_min(TINY).log() - log_scale
    mean_GR = ratio_BTGR[seen_BT.expand(ratio_BTGR.shape[:2])].mean(0)
    mix.bias.copy_((mean_GR + math.log(START / (1 - START))).flatten())


@torch.no_grad()
def fit_share(cell, call: AttentionCall, window: Tensor, linear: Tensor, on_BT: Tensor) -> None:
    """Set each query head's share g, and the linear branch's size where the cell has a number for it, to the least-squares fit of the teacher's
    output: (1 - g) window + g c linear, or window + g c linear where the branch is added. Outputs are [B, T, G, R, V] fp32."""
    exact, on = call.exact_BTGRV, on_BT.expand(window.shape[:2])
    if not cell.pieces["fit_share"] or exact is None or not fresh(cell) or not bool(on.any()):
        return
    w, l, e = (x.float()[on] for x in (window, linear, exact))  # [N, G, R, V]
    dot = lambda a, b: (a * b).sum((0, 3))  # noqa: E731
    ww, wl, ll, we, le = dot(w, w), dot(w, l), dot(l, l).clamp_min(TINY), dot(w, e), dot(l, e)
    if cell.pieces["combine"] == "added":
        share, size = ((le - wl) / ll), None
    elif (stretch := cell.stretch) is None:
        share, size = (le - wl - we + ww) / (ll - 2 * wl + ww).clamp_min(TINY), None
    else:
        x = (we * ll - le * wl) / (ww * ll - wl.square()).clamp_min(TINY)
        share = (1 - x).clamp(LEAST, MOST)
        part = ((le - (1 - share) * wl) / ll).clamp_min(0)
        size = torch.maximum(part / share, 0.1 * (ww / ll).sqrt())
        stretch(size)
    share = share.clamp(LEAST, MOST)
    cell.mix.bias.copy_(torch.logit(share).flatten())
