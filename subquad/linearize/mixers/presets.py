"""Presets: what a mixer name in a recipe stands for. Adding one is adding an entry here.

docs/papers.md says per preset where its formula was read and what was checked.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    about: str
    seeds: str  # rows of the project's table of systems
    uses: str = "cell"  # a row of CLASSES
    pieces: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    needs: str = "attention transfer"  # at conversion, before it is of use
    exact: str = "a window as long as the text"  # the setting with which the student is the teacher ("" where there is none)
    directions: tuple[str, ...] = ("causal",)


def _cell(about: str, seeds: str, paper: str, needs: str = "attention transfer", both: bool = False, **pieces: Any) -> Preset:
    directions = ("causal", "bidirectional") if both else ("causal",)
    return Preset(about, seeds, "cell", {"combine": "gated", "mass": -2.0, **pieces}, paper, needs, directions=directions)


def _sequential(about: str, seeds: str, paper: str, **pieces: Any) -> Preset:
    exact = "the gate's bias to -infinity and a window as long as the text"
    return Preset(about, seeds, "cell", {"combine": "sequential", "mass": -4.0, **pieces}, paper, exact=exact)


def _full(about: str, seeds: str, paper: str, needs: str = "nothing", exact: str = "", **pieces: Any) -> Preset:
    return Preset(about, seeds, "full", pieces, paper, needs, exact)


def _encoder(about: str, seeds: str, paper: str, **pieces: Any) -> Preset:
    return Preset(about, seeds, "cell", {"combine": "alone", **pieces}, paper, exact="", directions=("bidirectional",))


NONE = "nothing: no parameters in the map"

MIXERS = {
    "window": Preset("sinks + sliding window, nothing trained", "C04 C05", "window", paper="MASFormer (2023)", needs="nothing"),
    "window_linear": Preset(
        "window + linear attention of everything older under one normaliser, Hedgehog features",
        "A03 G02",
        pieces=dict(feature_map="hedgehog_softmax", decay="none", write="additive", combine="joint", mass=-1.0),
        paper="LoLCATs (2024), the exact form of its joint normaliser",
    ),
    "gla": Preset(
        "window + vector-gated linear attention, each with its own normaliser, mixed by a gate (Lizard)",
        "C01",
        pieces=dict(feature_map="hedgehog_softmax", decay="vector", write="additive", combine="gated", mass=-2.0),
        paper="Lizard (2025), GLA (2023)",
    ),
    "gated_delta": Preset(
        "window + gated delta rule, mixed by a gate",
        "B01",
        pieces=dict(feature_map="unit", decay="scalar", write="delta", combine="gated", mass=-2.0),
        paper="Gated DeltaNet (2024)",
    ),
    # --- linear attention by feature map ---
    "linear": _cell("elu + 1 features", "Dependencies", "Linear Transformer (2020)", NONE, both=True, feature_map="elu1"),
    "t2r": _cell("learned ReLU features", "Dependencies", "T2R (2021)", both=True, feature_map="relu_linear"),
    "performer": _cell("positive orthogonal random features", "A01", "Performer (2020)", NONE, both=True, feature_map="favor"),
    "cosformer": _cell("ReLU features under a cosine of the distance", "A02", "cosFormer (2022)", NONE, both=True, feature_map="cosine", position="drop"),
    "hedgehog_exp": _cell("learned [exp(Wx); exp(-Wx)]", "A03", "Hedgehog (2024), paper form", both=True, feature_map="hedgehog_exp"),
    "hedgehog_softmax2": _cell("learned [softmax(Wx); softmax(-Wx)]", "A03", "Hedgehog (2024), LoLCATs form", both=True, feature_map="hedgehog_softmax2"),
    "hedgehog_softmax": _cell(
        "learned softmax of [2Wx, -2Wx]", "A03", "Hedgehog (2024), flash-linear-attention form", both=True, feature_map="hedgehog_softmax"
    ),
    "cottention": _cell("cosine weights over a power of the count", "A04", "Cottention (2024)", NONE, both=True, feature_map="unit_norm", normaliser="count"),
    "taylorshift": _cell("1 + s + s^2/2 of the cosine", "A05", "TaylorShift (2024)", NONE, both=True, feature_map="taylor"),
    "efficient": _cell(
        "softmax over features, exp keys normalised per feature", "A06", "Efficient Attention (2018)", NONE,
        both=True, feature_map="efficient", normaliser="feature",
    ),
    "flowformer": _cell(
        "sigmoid features with conserved flow", "A07", "Flowformer (2022)", NONE,
        both=True, feature_map="sigmoid", key_weight="flow", normaliser="flow",
    ),
    "focused": _cell("cubed features of kept length", "A08", "FLatten (2023)", NONE, both=True, feature_map="focused"),
    "inline": _cell("centred weights, no division", "A10", "InLine (2024)", NONE, both=True, feature_map="scaled", normaliser="centred"),
    "rala": _cell(
        "keys re-weighted by their rank among all", "A11", "RALA (2024)", NONE,
        both=True, feature_map="elu1", key_weight="competition", output="gate",
    ),
    "mala": _cell(
        "magnitude-aware weights, token means (code form)", "A12", "MALA (2025), official code", NONE,
        both=True, feature_map="elu1_quarter", normaliser="magnitude", output="gate",
    ),
    "mala_sum": _cell(
        "magnitude-aware weights, token sums (paper form)", "A12", "MALA (2025), paper", NONE,
        both=True, feature_map="elu1_quarter", normaliser="magnitude_sum", output="norm",
    ),
    "nalaformer": _cell(
        "norm-aware powers of a signed split", "A13", "NaLaFormer (2025)", NONE, both=True, feature_map="norm_power", output="norm_gate"
    ),
    "l2vit": _cell("ReLU features, divisor at least 100", "A14", "L2ViT (2025)", NONE, feature_map="relu", normaliser="clamped"),
    "lln": _cell("exp(alpha x) features", "A15", "Linear Log-Normal Attention (2023)", NONE, feature_map="log_normal"),
    "lln_diag": _cell("exp(alpha x) features, half of it window", "A15", "Linear Log-Normal Attention (2023)", NONE, feature_map="log_normal", mass=0.0),
    "ecoformer": _cell("16-bit codes", "A17", "EcoFormer (2022)", feature_map="codes"),
    "transformer_vq": _cell(
        "softmax over 64 codewords in the place of older keys", "A19", "Transformer-VQ (2023)", feature_map="codebook", combine="logits"
    ),
    "kernelized": _cell("random features with learned frequencies", "A21", "On Learning the Transformer Kernel (2021)", feature_map="gmm"),
    "galerkin": _cell("layer-normed keys over the count", "A23", "Galerkin Transformer (2021)", NONE, both=True, feature_map="normed", normaliser="mean"),
    "fast": _cell("1 + cosine", "A26", "FAST (2024), p = 1", NONE, feature_map="fast1"),
    "fast2": _cell("1 + cosine + half its square", "A26", "FAST (2024), p = 2", NONE, feature_map="fast2"),
    "slab": _cell("ReLU features", "A09", "SLAB (2024), its attention without the convolution", NONE, feature_map="relu"),
    "power2": _cell("(q.k)^2", "E08", "Power-Softmax (2024), p = 2 as features", NONE, feature_map="quadratic"),
    # --- gated, decayed, delta-rule, state-space ---
    "deltanet": _cell("delta rule", "B01", "DeltaNet (2024)", feature_map="silu_unit", write="delta", output="norm"),
    "gated_deltanet": _cell(
        "gated delta rule, gates of the token that is written", "B01", "Gated DeltaNet (2024)",
        feature_map="silu_unit", decay="own_scalar", write="delta", output="norm_gate",
    ),
    "gsa": _cell("slots read by a softmax, gated", "B02", "Gated Slot Attention (2024)", container="gated_slots", position="drop"),
    "abc": _cell("slots read by a softmax, written by one", "Dependencies", "ABC (2021)", container="softmax_slots", position="drop"),
    "delta_slots": _cell(
        "slots written by a gated delta rule, read by a softmax", "K11 B01 B02", "no paper: the two passes of GSA with Gated DeltaNet's recurrence in both",
        decay="own_scalar", write="delta", container="slots", position="drop",
    ),
    "mamba": _cell(
        "a decay for every feature and value channel", "B03", "Mamba (2023)",
        feature_map="identity", write="selective", normaliser="none", output="norm_gate", position="drop",
    ),
    "titans": _cell(
        "gated delta rule with momentum", "B15", "Titans (2024), MAG with linear memory",
        feature_map="unit", decay="own_scalar", write="momentum", mass=-4.0,
    ),
    "mamba2": _cell(
        "scalar decay and step size", "B03 C07", "Mamba-2 (2024)",
        feature_map="identity", decay="step_size", write="step", normaliser="none", output="gate_norm", position="drop",
    ),
    "lightning": _cell(
        "SiLU features, fixed decays", "B04", "TransNormerLLM, Lightning Attention (2024)",
        feature_map="silu", decay="slopes", normaliser="none", output="norm_gate",
    ),
    "retnet": _cell(
        "fixed decays", "B13 Dependencies", "RetNet (2023)", feature_map="identity", decay="fixed", normaliser="none", output="norm_gate"
    ),
    "retention": _cell(
        "fixed decays, norm without gate", "B13", "RetNet (2023), one dimension of RMT",
        feature_map="identity", decay="fixed", normaliser="none", output="norm",
    ),
    "gated_linear": _cell(
        "vector gates of the token that is written", "Dependencies", "GLA (2023)",
        feature_map="identity", decay="own_vector", normaliser="none", output="norm_gate",
    ),
    "hgrn2": _cell(
        "keys as gates, their complement as what is written", "Dependencies", "HGRN2 (2024)",
        feature_map="silu", decay="key", write="convex", normaliser="none", output="norm",
    ),
    "rodimus": _cell(
        "two gates that share a temperature", "B07", "Rodimus (2024), its gate",
        feature_map="unit_norm", decay="dual", write="dual", normaliser="none", output="gate_norm",
    ),
    "sse": _cell(
        "four partitions, two used by a token", "B08", "Scaling Linear Attention with Sparse State Expansion (2025)",
        feature_map="hedgehog_softmax2", decay="scalar", container="partitions",
    ),
    "log_linear": _cell(
        "scalar-gated linear attention over blocks of growing size, each with a weight", "B06", "Log-Linear Attention (2025)",
        feature_map="hedgehog_softmax2", decay="scalar", container="levels",
    ),
    "log_linear_delta": _cell(
        "gated delta rule over blocks of growing size, each with a weight", "B06", "Log-Linear Attention (2025), Gated DeltaNet form",
        feature_map="silu_unit", decay="own_scalar", write="delta", container="levels", output="norm_gate",
    ),
    "gateloop": _cell(
        "complex decays", "B09", "GateLoop (2023)", feature_map="identity", decay="own_vector", position="phase", normaliser="none", output="norm_gate"
    ),
    "selective_rope": _cell(
        "gated linear attention with rotations from the layer input", "B11", "Selective RoPE (2025)",
        feature_map="identity", decay="own_vector", position="selective", normaliser="none", output="norm",
    ),
    # --- hybrids ---
    "rodimus_plus": _sequential(
        "two gates that share a temperature, then a window over the values they enrich", "B07 K9", "Rodimus+ (2024), recurrence then window",
        feature_map="unit_norm", decay="dual", write="dual", normaliser="none", output="gate_norm",
    ),
    "titans_mal": _sequential(
        "gated delta rule with momentum, then a window over the values it enriches", "B15 K9", "Titans (2024), MAL with linear memory",
        feature_map="unit", decay="own_scalar", write="momentum",
    ),
    "lizard": _cell(
        "window plus gated linear attention without rotation", "C01", "Lizard (2025)",
        feature_map="hedgehog_exp", decay="scalar", position="drop", combine="added", mass=-4.0,
    ),
    "rehyat": _cell("window and a learned polynomial map under one normaliser", "C02", "ReHyAt (2026)", feature_map="polynomial", combine="joint", mass=-1.0),
    "nha": _cell("slots and window in one softmax", "C03", "Native Hybrid Attention (2025)", container="gated_slots", position="drop", combine="logits"),
    "lolcats": _cell(
        "window and Hedgehog features, the window's maximum on its own side", "G02 0.2", "LoLCATs (2024), official code",
        feature_map="hedgehog_softmax2", combine="joint_top",
    ),
    "lola": _cell(
        "lolcats with the 128 pairs a head that its sums recall worst kept exact", "G02", "LoLA (2025), scores kept from when a pair leaves the window",
        feature_map="hedgehog_softmax2", combine="joint_top", cache=128,
    ),
    "liger": _cell(
        "keys as gates, softmax features, half window", "Dependencies", "Liger (2025)", "nothing: no new parameters but the mix",
        feature_map="softmax", decay="pooled_key", normaliser="none", mass=0.0,
    ),
    "supra": _cell(
        "learned ReLU features, fixed decays, norm", "G01", "SUPRA (2024)", feature_map="relu_linear", decay="fixed", normaliser="none", output="norm"
    ),
    "swat": _full(
        "a window of sigmoid weights with slopes of both signs", "C04", "SWAT (2025), paper form", "attention transfer", weights="sigmoid", near=True
    ),
    "shared_key": Preset("window attention with one key for all heads", "C08", "shared_key", paper="Rodimus+ (2024), its SW-SKA", exact=""),
    # --- every key and value is kept: other weights than the softmax's, or fewer keys looked at ---
    "blocked_softmax": _full("exact softmax, queries in blocks", "J01", "Self-attention Does Not Need O(n^2) Memory (2021)", exact="always"),
    "adasplash": _full("1.5-entmax", "D01", "AdaSplash (2025)", "annealing", weights="entmax15"),
    "entmax": _full("alpha-entmax, alpha learned per head", "D02", "Adaptively Sparse Transformers (2019)", "attention transfer", weights="entmax"),
    "sparsemax": _full("projection onto the simplex", "D03", "Sparsemax (2016)", "attention transfer", weights="sparsemax"),
    "moba": _full("the own block and the best blocks", "D06", "MoBA (2025)", exact="options.top as large as the number of blocks", blocks=True),
    "nsa": Preset(
        "block means, best blocks and a window, gated", "D07", "nsa", paper="Native Sparse Attention (2025)",
        exact="gates 0, 0, 1 and a window as long as the text",
    ),
    "delta_attention": Preset(
        "window with corrections from every 16th query's full attention", "D09", "delta_attention", paper="Delta Attention (2025)", needs="nothing",
        exact="options.stride 1, or a window as long as the text",
    ),
    "sigmoid": _full("sigmoid weights, bias -ln n", "E01", "FlashSigmoid (2024)", "attention transfer", weights="sigmoid"),
    "relu": _full("ReLU weights over the count", "E02", "Replacing softmax with ReLU (2023)", "attention transfer", weights="relu"),
    "softpick": _full("rectified softmax", "E04", "Softpick (2025)", "attention transfer", weights="softpick"),
    "scalable_softmax": _full("softmax of s ln n z", "E05", "Scalable-Softmax (2025)", exact="p ln n = 1, at the start so at 1,024 tokens", weights="scalable"),
    "self_adjust": _full("softmax times its logit", "E06", "Self-Adjust Softmax (2025)", "attention transfer", weights="self_adjusted"),
    "power_softmax": _full("squares over their sum", "E08", "Power-Softmax (2024), p = 2", "attention transfer", weights="power"),
    "fox": _full(
        "softmax with forget gates, faded keys pruned", "E09", "Forgetting Transformer (2025), Adaptive Computation Pruning (2025)",
        exact="the forget gates' bias to +infinity", forget=True,
    ),
    "softmax1": _full("softmax with a learned sink", "E14", "Outlier-Efficient Hopfield Layers (2024)", exact="the sink's logit to -infinity", weights="softmax1"),
    "clipped_softmax": _full("softmax stretched and clipped", "E15", "Quantizable Transformers (2023)", exact="a stretch of 0, as at the start", weights="clipped"),
    "gated_attention": _full("softmax times an output gate", "E15", "Quantizable Transformers (2023)", exact="the gate's bias to +infinity", gated=True),
    # --- encoders only ---
    "agent": Preset(
        "softmax through 16 pooled queries", "A25", "agent", paper="Agent Attention (2023)", needs=NONE, exact="", directions=("bidirectional",)
    ),
    "relative": Preset(
        "random features with learned relative positions, by FFT", "A22", "relative", paper="Stable, Fast and Accurate (2021)", exact="",
        directions=("bidirectional",),
    ),
    "lion_lit": _encoder("LION without decay", "B10", "LION (2025)", feature_map="elu1"),
    "lion_d": _encoder("LION with a fixed decay per head", "B10", "LION (2025)", feature_map="elu1", decay="fixed"),
    "lion_s": _encoder("LION with a decay from the layer input", "B10", "LION (2025)", feature_map="elu1", decay="scalar"),
}  # fmt: skip
