"""What ``transfer_matrix.py`` says of what it measured: tables beside the paper's, the findings
that must hold, and check's forecast against the outcome. All of it from the document alone.

The paper is Lin et al., "Efficient Model Development through Fine-tuning Transfer" (2025,
arXiv 2503.20110): GSM8K on five OLMo 2 7B checkpoints, M1…M3 of stage 1 and M4, M5 of stage 2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

import numpy as np
from harness import Row, origin, spread, table

Points = Sequence[Sequence[float]]  # steps taken and score

OLMO_BASE = (13.2, 19.4, 24.4, 64.5, 65.5)
OLMO_TUNED = (45.1, 50.7, 60.4, 75.7, 75.5)
OLMO = (  # by delta, then by target; of its own base nothing is told
    (None, 26.6, 32.0, 27.5, 19.6),
    (19.0, None, 39.8, 25.9, 17.3),
    (14.3, 25.0, None, 68.6, 70.3),
    (11.8, 18.0, 22.6, None, 77.1),
    (11.9, 16.0, 24.0, 72.9, None),
)
OLMO_FAMILY: Row = {
    "base": [score / 100 for score in OLMO_BASE],
    "stage_one": 3,
    "cells": [
        {"target": i, "source": j, "score": (OLMO_TUNED[i] if score is None else score) / 100}
        for j, row in enumerate(OLMO)
        for i, score in enumerate(row)
    ],
}
# Algorithm 1: of each target FT alone, direct and iterative.
OLMO_RECYCLED = {2: (60.4, 62.7, 67.0), 3: (75.7, 77.6, 77.3), 4: (75.6, 77.2, 77.5)}
OLMO_FROM_FIRST = {4: 78.6}  # FT(M5 + Δ1)

# From which gain on a transfer is good, and below which it does harm: two standard errors of
# a score from 400 examples and more.
GOOD, HARM = 0.1, -0.02
# A score counts as reached within this: a standard error of a score near 1.
NEARLY = 0.01
NUMBERS = ("drift", "cosine", "drift_over_delta", "reach")
RISK = "drift"  # the number whose ranks are compared with the gains'
RANKED, LET_THROUGH, REFUSED = 0.8, 0, 0.1  # the goals


# --- the measures ---


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of ranks, ties sharing theirs; nan where one side has one value only."""
    x, y = (_ranks(np.asarray(side, float)) for side in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norms = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norms) if norms else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def steps_to_reach(points: Points, score: float) -> int | None:
    """The first step at which a curve has ``score``."""
    return next((int(step) for step, value in points if value >= score - 1e-9), None)


def transfers(family: Row) -> list[Row]:
    """The cells of one matrix but for its diagonal, with what was gained."""
    base = family["base"]
    tuned = {cell["target"]: cell["score"] for cell in family["cells"] if _own(cell)}
    found = []
    for cell in family["cells"]:
        if not _own(cell):
            before, learnt = base[cell["target"]], tuned[cell["target"]] - base[cell["target"]]
            gain = cell["score"] - before
            share = gain / learnt if learnt else 0.0
            found.append(cell | {"gain": gain, "recovered": share})
    return found


def _own(cell: Row) -> bool:
    return cell["target"] == cell["source"]


def is_near(cell: Row, stage_one: int) -> bool:
    """Neighbours within one stage."""
    same = (cell["target"] < stage_one) == (cell["source"] < stage_one)
    return same and abs(cell["target"] - cell["source"]) == 1


def goes_up(cell: Row, stage_one: int) -> bool:
    """A delta of stage 1 on a version of stage 2."""
    return cell["source"] < stage_one <= cell["target"]


# --- what must hold ---


@dataclass(frozen=True)
class Finding:
    """``values`` of every family; the worst of them must keep the ``limit``."""

    what: str
    values: Sequence[float]
    limit: float
    at_least: bool
    paper: str

    @property
    def holds(self) -> bool:
        values = np.asarray(self.values)
        return bool((values >= self.limit if self.at_least else values <= self.limit).all())

    def cells(self) -> list[str]:
        limit = f"{'≥' if self.at_least else '≤'} {self.limit:g}"
        said = "reproduces" if self.holds else "does not reproduce"
        return [self.what, self.paper, limit, spread(self.values), said]


def findings(document: Row) -> list[Finding]:
    """Near beats far, adding across the stage change hurts, and M + Δ is the better start."""
    families = document["families"]
    apart, paper = list(map(nearness, families)), f"{nearness(OLMO_FAMILY):.2f}"
    found = [Finding("gain of neighbours − of all others", apart, 0.15, True, paper)]
    if families[0]["stage_one"] < len(families[0]["base"]):
        up, paper = list(map(upward, families)), f"{upward(OLMO_FAMILY):.2f}"
        found.append(Finding("gain of stage 1's Δ on stage 2", up, -0.1, False, paper))
    shares = [steps_share(family) for family in families]
    found.append(Finding("steps to FT's score, from M + Δ / from M", shares, 0.75, False, "–"))
    return found


def nearness(family: Row) -> float:
    return _mean_gain(family, is_near) - _mean_gain(family, lambda c, s: not is_near(c, s))


def upward(family: Row) -> float:
    return _mean_gain(family, goes_up)


def _mean_gain(family: Row, chosen: Callable[[Row, int], bool]) -> float:
    cells = [c for c in transfers(family) if chosen(c, family["stage_one"])]
    return statistics.mean(cell["gain"] for cell in cells)


def steps_share(family: Row) -> float:
    """Of all continued transfers together."""
    alone = {c["target"]: c["points"] for c in family["curves"] if c["source"] is None}
    pairs = [(alone[c["target"]], c["points"]) for c in family["curves"] if c["source"] is not None]
    before = sum(steps_to_match(points, points) for points, _ in pairs)
    return sum(starmap(steps_to_match, pairs)) / before if before else float("nan")


# --- the forecast ---


def halves(document: Row) -> tuple[list[Row], list[Row]]:
    """Transfers of the families that limits are chosen on, and of those they are judged by."""
    families = document["families"]
    first = (len(families) + 1) // 2
    parts = (families[:first], families[first:])
    one, other = ([cell for family in part for cell in transfers(family)] for part in parts)
    return one, other


def let_through(cells: Sequence[Row]) -> tuple[int, int]:
    """Harmful transfers that are not refused, of how many."""
    harmful = [cell for cell in cells if cell["gain"] < HARM]
    return sum(cell["verdict"] != "refuse" for cell in harmful), len(harmful)


def refused(cells: Sequence[Row]) -> tuple[int, int]:
    """Good transfers that are refused, of how many."""
    good = [cell for cell in cells if cell["gain"] > GOOD]
    return sum(cell["verdict"] == "refuse" for cell in good), len(good)


def risk(cells: Sequence[Row], number: str) -> list[float]:
    """Large where a transfer is unlikely to help."""
    return [-cell[number] if number == "cosine" else cell[number] for cell in cells]


def correlation(cells: Sequence[Row], number: str, outcome: str = "gain") -> float:
    """1 where the less risky of two transfers always gains more."""
    return -spearman(risk(cells, number), [cell[outcome] for cell in cells])


def edges(cells: Sequence[Row], number: str) -> tuple[float, float]:
    """The riskiest value of a good transfer, and the least risky of a harmful one: a limit between
    them refuses all harm and nothing good; they cross where there is no such limit."""
    values = np.asarray(risk(cells, number), float)
    gains = np.asarray([cell["gain"] for cell in cells])
    good, harmful = values[gains > GOOD], values[gains < HARM]
    sign = -1 if number == "cosine" else 1
    return sign * good.max(initial=-np.inf), sign * harmful.min(initial=np.inf)


# --- tables ---


def render(document: Row) -> str:
    beside = " In brackets GSM8K on OLMo 2 7B, from the paper." if _like_paper(document) else ""
    parts = [
        origin(document),
        f"Score in %.{beside}",
        matrix_table(document),
        "Fine-tuned on from there: final score, and steps until the score of FT(M).",
        recycled_table(document),
        findings_table(document),
        "The forecast's numbers against the gain, and against the share of FT's gain.",
        *forecast_tables(document),
    ]
    return "\n\n".join(parts)


def _like_paper(document: Row) -> bool:
    return len(document["families"][0]["base"]) == len(OLMO_BASE)


def _middle(values: Iterable[float]) -> str:
    return f"{100 * statistics.median(values):.1f}"


def _beside(ours: str, paper: float | None) -> str:
    return ours if paper is None else f"{ours} ({paper})"


def matrix_table(document: Row) -> str:
    """Medians over the families; the paper's in brackets, where the shape is the paper's."""
    families = document["families"]
    count = len(families[0]["base"])
    like = _like_paper(document)

    def paper(row: Sequence[float | None], i: int) -> float | None:
        return row[i] if like else None

    def cell(i: int, j: int) -> str:
        values = [c["score"] for f in families for c in f["cells"] if _at(c, i, j)]
        return "–" if i == j else _beside(_middle(values), paper(OLMO[j], i))

    def alone(i: int) -> list[float]:
        return [c["score"] for f in families for c in f["cells"] if _at(c, i, i)]

    n = range(count)
    rows = [
        [
            "base",
            *(_beside(_middle(f["base"][i] for f in families), paper(OLMO_BASE, i)) for i in n),
        ]
    ]
    rows += [[f"+ Δ{j + 1}", *(cell(i, j) for i in n)] for j in n]
    rows.append(["FT(M)", *(_beside(_middle(alone(i)), paper(OLMO_TUNED, i)) for i in n)])
    return table(["", *(f"M{i + 1}" for i in n)], rows)


def _at(cell: Row, i: int, j: int | None) -> bool:
    return cell["target"] == i and cell["source"] == j


def recycled_table(document: Row) -> str:
    """FT alone, transferring then fine-tuning, and Algorithm 1: final scores, then steps."""
    families = document["families"]
    rows = []
    for i in range(1, len(families[0]["base"])):
        ways = [_curves(families, i, source) for source in (None, 0, i - 1)]
        ways.append([family["iterative"][i - 1] for family in families])
        papers = _paper_ends(i) if _like_paper(document) else (None,) * 4
        ends = [_middle(points[-1][1] for points in way) for way in ways]
        rows.append([f"M{i + 1}", *map(_beside, ends, papers), *(_steps(ways[0], w) for w in ways)])
    head = ["FT(M)", "M + Δ1", "direct", "iterative"]
    return table(["", *head, *(f"steps, {name}" for name in head)], rows)


def _curves(families: Sequence[Row], i: int, j: int | None) -> list[Points]:
    return [c["points"] for f in families for c in f["curves"] if _at(c, i, j)]


def _paper_ends(i: int) -> tuple[float | None, ...]:
    alone, direct, iterative = OLMO_RECYCLED.get(i, (None, None, None))
    return alone, OLMO_FROM_FIRST.get(i), direct, iterative


def _steps(alone: Sequence[Points], others: Sequence[Points]) -> str:
    """Median of the steps to the score that each family's FT(M) ends with."""
    return f"{statistics.median(map(steps_to_match, alone, others)):g}"


def steps_to_match(alone: Points, points: Points) -> int:
    """One that never gets there counts with all its steps."""
    reached = steps_to_reach(points, alone[-1][1] - NEARLY)
    return int(points[-1][0]) if reached is None else reached


def findings_table(document: Row) -> str:
    rows = [finding.cells() for finding in findings(document)]
    return table(["finding", "OLMo 2", "must be", "median (worst–best)", ""], rows)


def forecast_tables(document: Row) -> list[str]:
    chosen, judged = halves(document)
    return [numbers_table(chosen, judged), *([goals(judged)] if judged else [])]


def numbers_table(chosen: Sequence[Row], judged: Sequence[Row]) -> str:
    rows = []
    for number in NUMBERS:
        good, harmful = edges(chosen, number)
        ranks = [
            f"{correlation(cells, number, outcome):.2f}" if cells else "–"
            for cells in (chosen, judged)
            for outcome in ("gain", "recovered")
        ]
        rows.append([number, *ranks, f"{good:.3g}", f"{harmful:.3g}"])
    head = ["", "rank: gain", "share", "other half: gain", "share"]
    return table([*head, "good up to", "harm from"], rows)


def goals(cells: Sequence[Row]) -> str:
    (through, harmful), (stopped, good) = let_through(cells), refused(cells)
    rank = correlation(cells, RISK)
    waved = sum(c["verdict"] == "go" for c in cells if c["gain"] < HARM)
    rows = [
        ["rank correlation", f"≥ {RANKED}", f"{rank:.2f}", _met(rank >= RANKED)],
        [
            "harmful let through",
            f"{LET_THROUGH}",
            f"{through} of {harmful}",
            _met(through <= LET_THROUGH),
        ],
        ["harmful with go", "0", f"{waved} of {harmful}", _met(not waved)],
        [
            "good refused",
            f"≤ {REFUSED:.0%}",
            f"{stopped} of {good}",
            _met(stopped <= REFUSED * good),
        ],
    ]
    return table(["forecast", "goal", "measured", ""], rows)


def _met(met: bool) -> str:
    return "met" if met else "missed"


def draw(document: Row, file: Path) -> None:
    """The mean gains, and the median curves of the last version."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = document["families"]
    count = len(families[0]["base"])
    gains = np.zeros((count, count))
    for family in families:
        for cell in transfers(family):
            gains[cell["source"], cell["target"]] += cell["gain"] / len(families)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = [str(i + 1) for i in range(count)]
    image = left.imshow(gains, cmap="RdBu", vmin=-1, vmax=1)
    left.set_xticks(range(count), [f"M{n}" for n in names])
    left.set_yticks(range(count), [f"Δ{n}" for n in names])
    left.set_title("gain of M + Δ over M")
    figure.colorbar(image)
    for source in (None, 0, count - 2):
        curves = [c["points"] for f in families for c in f["curves"] if _at(c, count - 1, source)]
        name = f"M{count}" + ("" if source is None else f" + Δ{source + 1}")
        middle = np.median([[value for _, value in points] for points in curves], axis=0)
        right.plot([step for step, _ in curves[0]], middle, label=name)
    right.set_title("then fine-tuned: score by steps")
    right.legend()
    figure.savefig(file)
    pyplot.close(figure)
