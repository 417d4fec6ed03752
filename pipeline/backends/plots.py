"""Pictures for a card's page: PNG of 1600 pixels width, the same bytes for the same card. Names and figures only, no text of records."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

# Okabe and Ito's colours, which people with any of the common colour blindnesses tell apart; shapes differ too
_BLUE, _ORANGE, _GREY, _INK = "#0072b2", "#d55e00", "#8a8a8a", "#222222"
_STYLES = {"model": (_BLUE, "o", _BLUE), "given": (_ORANGE, "s", "white"), "baseline": (_GREY, "D", _GREY)}
_KINDS = {"model": "a model", "given": "a rater or another system", "baseline": "baseline"}
_NAMES = {"fine_tuned": "fine-tuned", "model_set": "model set", "majority": "majority (baseline)"}
_WIDTH, _DPI = 8.0, 200
_SETTINGS: dict[Any, Any] = {
    "font.size": 11,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.usetex": False,
}


@dataclass(frozen=True, slots=True)
class Plot:
    png: bytes
    alt: str  # what it shows, in words and figures


def draw(card: Mapping[str, Any]) -> dict[str, Plot]:
    """File name -> plot, of what a card (read from metadata/) has figures for: accuracy, confusion, learning curve."""
    about = card["pipeline"]
    told = about if about["kind"] == "run" else about.get("metrics") or {}
    systems: Mapping[str, Any] = told.get("systems") or {}
    found: dict[str, Plot] = {}
    scored = {name: s["accuracy"] for name, s in systems.items() if (s.get("accuracy") or {}).get("value") is not None}
    if scored:
        found["accuracy.png"] = accuracy(scored, {name: systems[name].get("kind", "model") for name in scored})
    primary = systems.get(about.get("primary") or "") or {}
    if primary.get("confusion") and about.get("labels"):
        found["confusion.png"] = confusion(about["primary"], about["labels"], primary["confusion"])
    training = about.get("training") or {}
    if len(training.get("epochs") or ()) > 1:  # one epoch is no course
        found["learning_curve.png"] = learning_curve(training["epochs"], training.get("best_epoch"))
    return found


# --- the three -------------------------------------------------------------------------------------------------------


def accuracy(estimates: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]) -> Plot:
    """One line a system: a mark at its accuracy, a bar over its 95 % interval."""
    names = list(estimates)
    with _axes(1.3 + 0.5 * len(names)) as (figure, axes):
        for y, name in enumerate(names):
            colour, marker, face = _STYLES.get(kinds[name], _STYLES["model"])
            value, low, high = (float("nan") if (x := estimates[name].get(part)) is None else x for part in ("value", "low", "high"))
            if not math.isnan(low + high):
                axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot(100 * value, y, marker=marker, color=colour, markerfacecolor=face, markersize=10, markeredgewidth=2)
            axes.annotate(f"{100 * value:.1f} %", (100 * value, y), (0, 9), textcoords="offset points", ha="center", color=_INK)
        shown = [f"rater {n}" if kinds[n] == "given" and n != "copilot" else _NAMES.get(n, n) for n in names]
        axes.set_yticks(range(len(names)), _shown(shown, "system"))
        axes.set_ylim(len(names) - 0.5, -0.7)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("Right ratings, % of test rows; bar: 95 % interval")
        axes.grid(axis="x", color="#dddddd")
        for kind in dict.fromkeys(kinds.values()):
            colour, marker, face = _STYLES.get(kind, _STYLES["model"])
            words = _KINDS.get(kind, kind)
            axes.plot([], [], marker=marker, color=colour, markerfacecolor=face, markeredgewidth=2, linewidth=0, label=words)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.55 / (0.3 + 0.5 * len(names))), ncols=3, frameon=False)
        return Plot(
            _png(figure),
            "Accuracy of each system: " + "; ".join(_told(words, estimates[name]) for words, name in zip(shown, names, strict=True)),
        )


def confusion(system: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Plot:
    """Expert's ratings against the system's, as counts; the darker, the greater the share of the row."""
    columns = [*labels, "no usable rating"][: max(map(len, counts))]
    with _axes(1.9 + 0.62 * len(labels)) as (figure, axes):
        shares = [[n / max(1, sum(row)) for n in row] for row in counts]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(counts):
            for x, n in enumerate(row):
                axes.text(x, y, f"{n}", ha="center", va="center", color="white" if shares[y][x] > 0.5 else _INK)
        axes.set_xticks(range(len(columns)), _shown(columns, "rating", 18))
        axes.set_yticks(range(len(labels)), _shown(labels, "rating", 22))
        if len(columns) > 5:
            axes.tick_params(axis="x", rotation=30)
        axes.set_xlabel(f"Rating of {_shown([_NAMES.get(system, system)], 'the system')[0]}; shade: share of the row")
        axes.set_ylabel("Rating of the expert")
        cells = (
            f"{n} rated {label} by the expert were {'left without a usable rating' if x == len(labels) else f'called {columns[x]}'}"
            for label, row in zip(labels, counts, strict=False)
            for x, n in enumerate(row)
            if n
        )
        return Plot(_png(figure), f"Test rows by the expert's rating and by that of {_NAMES.get(system, system)}: " + "; ".join(cells))


def learning_curve(epochs: Sequence[Mapping[str, Any]], best: int | None) -> Plot:
    """Both losses over the epochs; the lines differ in dash and mark, not in colour alone."""
    x = [epoch["epoch"] for epoch in epochs]
    with _axes(3.4) as (figure, axes):
        parts = []
        lines = (("training", "train_loss", _BLUE, "o", "-"), ("validation", "valid_loss", _ORANGE, "s", "--"))
        for name, field, colour, marker, dash in lines:
            points = [(n, epoch[field]) for n, epoch in zip(x, epochs, strict=True) if epoch.get(field) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=dash, linewidth=2, markersize=8, label=name)
                parts.append(f"{name} loss {', '.join(f'{loss:.3f}' for _, loss in points)}")
        if best is not None and best in x:
            axes.axvline(best, color=_GREY, linestyle=":", linewidth=1.5, label="epoch that was kept")
        axes.set_xticks(x if len(x) <= 12 else x[:: math.ceil(len(x) / 12)])
        axes.set_xlabel("Epoch")
        axes.set_ylabel("Loss per answer token")
        axes.grid(axis="y", color="#dddddd")
        axes.legend(frameon=False)
        kept = f"; epoch {best} was kept" if best in x else ""
        return Plot(_png(figure), f"Loss by epoch, from {x[0]} to {x[-1]}: {'; '.join(parts)}{kept}")


# --- drawing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _axes(height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of its own, whatever the user's matplotlib settings are, and nothing of it left in them."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is drawn as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})  # no version and no date: the same bytes everywhere
    return out.getvalue()


def _shown(names: Sequence[str], what: str, longest: int = 26) -> list[str]:
    """Names that the font can write; a number stands for one that it can't, and the words beside the picture say which it is."""
    known = get_font(findfont(FontProperties())).get_charmap()
    found = []
    for number, name in enumerate(names, 1):
        line = " ".join(re.sub("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]", " ", name).split())
        line = line if line and all(ord(character) in known for character in line) else f"{what} {number}"
        found.append(line if len(line) <= longest else line[: longest - 1] + "…")
    return found


def _told(name: str, estimate: Mapping[str, Any]) -> str:
    value, low, high = (estimate.get(part) for part in ("value", "low", "high"))
    interval = f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
    return f"{name} {100 * (value or 0):.1f} %{interval}"
