"""Pictures as inline SVG (matplotlib): text as text in the page's own colour, so that they fit a light and a dark page; no network, no fonts.

The three series colours have a contrast of at least 3 to 1 against both backgrounds of page.html.j2 (WCAG 2.2, 1.4.11), and every series has its
own line style and marker, so that no picture depends on colour alone.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from itertools import count
from typing import Any

from subquad.errors import UserError

INK = "#0123ab"  # stands for the page's text colour and is replaced by currentColor
STYLES = (
    {"color": "#2f7ed8", "marker": "o", "linestyle": "-"},
    {"color": "#cf6a17", "marker": "s", "linestyle": "--"},
    {"color": "#2e8f57", "marker": "^", "linestyle": "-."},
    {"color": "#a35bc4", "marker": "D", "linestyle": ":"},
)
KINDS = {"exact": "#2f7ed8", "converted": "#cf6a17", "the teacher's own window or recurrence": "#7f7f7f"}
_numbers = count(1)


def plots():
    """matplotlib.pyplot on its SVG backend; UserError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "The report draws with matplotlib, which is not installed: pip install -c constraints.txt 'subquad[report]'."
        ) from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "subquad", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
        "ytick.color": INK, "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "axes.grid": True, "grid.alpha": 0.25, "grid.color": INK, "figure.constrained_layout.use": True,
    })  # fmt: skip
    return pyplot


def svg(figure, title: str, description: str) -> str:
    """A finished figure as an <svg> that screen readers announce by its title and description, with ids of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plots().close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    number = next(_numbers)
    text = re.sub(r'\bid="', f'id="f{number}-', text)
    text = re.sub(r"url\(#", f"url(#f{number}-", text)
    text = re.sub(r'xlink:href="#', f'href="#f{number}-', text)
    head, _, body = text.partition(">")
    head = re.sub(r'\s(width|height|version|xmlns:xlink|xmlns)="[^"]*"', "", head)
    label = f'<title id="t{number}">{escape(title)}</title><desc id="d{number}">{escape(description)}</desc>'
    return f'{head} role="img" aria-labelledby="t{number} d{number}">{label}{body}'


def lines(
    title: str,
    description: str,
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """A curve per name."""
    pyplot = plots()
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4))
    for style, (name, (xs, ys)) in zip(_styles(len(series)), series.items(), strict=True):
        marker = style["marker"] if len(xs) <= 40 else None
        axes.plot(xs, ys, label=name, color=style["color"], linestyle=style["linestyle"], marker=marker, markersize=5)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({value for xs, _ in series.values() for value in xs})
        axes.set_xticks(ticks, [short(value) for value in ticks])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    if len(series) > 1:
        axes.legend()
    return svg(figure, title, description)


def fan(title: str, description: str, curves: dict[int, tuple[Sequence[float], Sequence[float]]], x: str, y: str, what: str) -> str:
    """A thin curve per number, dark to light in their order; the legend has five of them. (A colour bar would be a bitmap.)"""
    pyplot = plots()
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4))
    shades = pyplot.cm.ScalarMappable(pyplot.Normalize(min(curves), max(curves)), "cividis")
    named = sorted(curves)[:: max(1, len(curves) // 4)]
    for number, (xs, ys) in curves.items():
        axes.plot(xs, ys, color=shades.to_rgba(number), linewidth=0.8, label=f"{what} {number}" if number in named else None)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.legend()
    return svg(figure, title, description)


def heads(title: str, description: str, layers: Sequence[tuple[int, Sequence[str]]]) -> str:
    """The strip of layers x key/value heads, coloured by kind; layers: (index, kind of every head). Exact heads carry a dot."""
    pyplot = plots()
    from matplotlib.patches import Patch, Rectangle

    most = max(len(kinds) for _, kinds in layers)
    figure, axes = pyplot.subplots(figsize=(max(6.4, 0.24 * len(layers)), 1.3 + 0.24 * most))
    for column, (_, kinds) in enumerate(layers):
        for head, kind in enumerate(kinds):
            axes.add_patch(Rectangle((column - 0.45, head - 0.45), 0.9, 0.9, color=KINDS[kind]))
            if kind == "exact":
                axes.plot(column, head, "o", color="white", markersize=3)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(most - 0.4, -0.6)
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), [str(index) for index, _ in layers][::step])
    axes.set_yticks(range(most) if most <= 8 else range(0, most, 4))
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.grid(False)
    used = [kind for kind in KINDS if any(kind in kinds for _, kinds in layers)]
    figure.legend(
        handles=[Patch(color=KINDS[kind], label=kind + (" (dot)" if kind == "exact" else "")) for kind in used],
        loc="outside upper left",
        ncols=len(used),
    )
    return svg(figure, title, description)


def heat(
    title: str, description: str, values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], x: str, y: str
) -> str:
    """Shares from 0 to 1 as a map with the numbers written in; None is left open."""
    pyplot = plots()
    from matplotlib.patches import Rectangle

    figure, axes = pyplot.subplots(figsize=(1.6 + 0.8 * len(columns), 1.2 + 0.42 * len(rows)))
    colour = pyplot.get_cmap("cividis")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value is not None:
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=colour(float(value))))
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="black" if value > 0.55 else "white")
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(False)
    return svg(figure, title, description)


def dots(title: str, description: str, names: Sequence[str], values: Sequence[float], x: str) -> str:
    """A dot per name, the first on top, with a line down from it: what the others are compared with. Logarithmic, one outlier hides the rest else."""
    pyplot = plots()
    figure, axes = pyplot.subplots(figsize=(6.4, 0.8 + 0.3 * len(names)))
    axes.axvline(values[0], color=STYLES[1]["color"], linestyle=STYLES[1]["linestyle"])
    axes.plot(values, range(len(names)), "o", color=STYLES[0]["color"])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"{x} (logarithmic)")
    plain_numbers(axes.xaxis)
    return svg(figure, title, description)


def plain_numbers(axis) -> None:
    """20 and 1,000 at the ticks of a logarithmic axis, not powers of ten; fewer of them where it spans decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: _large(value)))
    axis.set_minor_formatter(NullFormatter())


def _large(value: float) -> str:
    """200 M, 1.5 G in the place of ten digits."""
    for sign, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:g} {sign}"
    return f"{value:,g}"


def short(value: float) -> str:
    """1024 -> 1k."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _styles(number: int) -> list[dict[str, Any]]:
    return [STYLES[i % len(STYLES)] for i in range(number)]
