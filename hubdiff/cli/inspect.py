"""``hubdiff inspect``: what a delta is, without its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session
from hubdiff.summary import percent, size_text

if TYPE_CHECKING:
    from hubdiff.jobs.inspect import Inspection
    from hubdiff.manifest import Manifest, Part, Side, TensorRecord
    from hubdiff.picture import LayerRow

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAR, _BAR_IN_A_PIPE = 10, 4


@click.command(
    "inspect",
    short_help="Say what a delta is, without its weights.",
    cls=shared.Command,
    usage="DELTA [OPTIONS]",
    examples=(
        "hubdiff inspect me/tuned-delta",
        "hubdiff inspect me/tuned-delta@v2 --json",
        "hubdiff inspect ./tuned-delta",
    ),
)
@click.argument("delta")
@shared.cache
@shared.json_output
@pass_session
def command(session: Session, delta: str, cache: bool) -> None:
    """Say what DELTA is: made from what, its sizes and encodings, how far each layer moved.

    Reads the manifest only, no weights.
    """
    from hubdiff.jobs.inspect import inspect

    with session.working():
        inspection = inspect(delta, cache=cache)
    session.show(inspection.as_json(), lambda page: _draw(page, inspection))


def _draw(page: Page, inspection: Inspection) -> None:
    _draw_facts(page, inspection)
    _draw_layers(page, inspection.layers)
    manifest = inspection.manifest
    added = [_tensor(record) for record in manifest.tensors if record.added]
    left = [f"{f.path}, {size_text(f.size)}: {f.reason}" for f in manifest.not_carried]
    renamed = [
        f"{r.tuned_name} in tuned is {r.name} in base"
        for r in manifest.tensors
        if r.tuned_name != r.name
    ]
    errors = [
        f"{r.name}: {percent(p.low_rank.error)}, rank {p.low_rank.rank} in {p.low_rank.dtype}"
        for r, p in worst_factors(manifest)
        if p.low_rank and manifest.lossy
    ]
    sections = (
        ("Error of the factors, the worst first", errors),
        ("Added by the tune", added),
        ("In the base only", list(manifest.removed)),
        ("Renamed", renamed),
        ("One tensor under two names", [f"{a} is {b}" for a, b in manifest.aliases.items()]),
        ("Files of tuned that it does not carry", left),
    )
    for title, texts in sections:
        if texts:
            page.heading(f"{title} ({len(texts):,})")
            page.items(texts)


def worst_factors(manifest: Manifest) -> list[tuple[TensorRecord, Part]]:
    """The tensors that are stored as factors, those with the largest error first."""
    found = [(record, part) for record in manifest.tensors for part in record.parts]
    factors = [(r, p, p.low_rank.error) for r, p in found if p.low_rank]
    return [(r, p) for r, p, _ in sorted(factors, key=lambda item: -item[2])]


def _draw_facts(page: Page, inspection: Inspection) -> None:
    manifest, summary = inspection.manifest, inspection.summary
    share = f", {percent(summary.size_share)} of" if summary.size_share is not None else " for"
    exact = f", {size_text(summary.exact_bytes)} of them exact" if summary.exact_bytes else ""
    encodings = ", ".join(f"{name} {size_text(n)}" for name, n in summary.encodings.items())
    moved = summary.relative_norm
    same = summary.unchanged_share
    page.fields(
        [
            ("delta", inspection.delta),
            ("base", _side(manifest.base)),
            ("tuned", _side(manifest.tuned)),
            ("master", _side(manifest.master) if manifest.master else None),
            ("made with", f"hubdiff {manifest.hubdiff_version}"),
            ("code", _code(manifest.provenance)),
            ("portable", _portable(manifest.not_portable_reason)),
            (
                "rebuilds",
                f"no: {manifest.no_rebuild_reason}"
                if manifest.no_rebuild_reason
                else "yes: on its own base every file of tuned comes back, byte for byte",
            ),
            (
                "error",
                f"{percent(manifest.lossy.error)}, measured as ‖Δ − stored‖/‖Δ‖"
                if manifest.lossy
                else None,
            ),
            (
                "size",
                f"{size_text(summary.delta_bytes)}{share} tuned's "
                f"{size_text(summary.tuned_bytes)}{exact}",
            ),
            ("encodings", encodings),
            (
                "tensors",
                f"{summary.changed:,} changed, {summary.unchanged:,} unchanged, "
                f"{summary.added:,} added, {summary.removed:,} removed",
            ),
            ("unchanged", f"{percent(same)} of the weights" if same is not None else None),
            ("‖Δ‖/‖base‖", percent(moved) if moved is not None else None),
        ]
    )


def _side(side: Side) -> str:
    pin = f"@{side.commit}" if side.commit else ""
    asked = f"revision {side.revision}" if side.revision else None
    local = "a local folder" if side.repo is None else None
    gated = "gated" if side.gated else None
    remarks = ", ".join(text for text in (asked, local, side.licence, gated) if text)
    return f"{side.name}{pin}" + (f" ({remarks})" if remarks else "")


def _code(provenance: dict[str, object] | None) -> str | None:
    if provenance is None:
        return None
    dirty = provenance.get("dirty")
    state = ", with uncommitted changes" if dirty else ""
    if dirty is None:
        state = ", perhaps with uncommitted changes"
    return f"{provenance.get('remote') or 'a local repo'}@{provenance.get('commit')}{state}"


def _portable(reason: str | None) -> str:
    return f"no: {reason}" if reason else "yes: it can be added to other bases of the family"


def _tensor(record: TensorRecord) -> str:
    return f"{record.name}: {record.dtype} {list(record.shape)}"


def _draw_layers(page: Page, rows: Sequence[LayerRow]) -> None:
    """One line per layer, one column per kind, each with a bar on a scale that all share."""
    from hubdiff.anatomy import KINDS

    if not rows:
        return
    here = {row.kind for row in rows}
    kinds = [kind for kind in KINDS if kind in here]
    # What lies outside the layers, such as a new head, may dwarf them: no bars there, unless there
    # is nothing else.
    barred = [row for row in rows if row.layer is not None] or list(rows)
    largest = max(row.relative_norm or 0.0 for row in barred)
    width = _bar_width(page, len(kinds))
    lines: dict[str, dict[str, LayerRow]] = {}
    several = len({row.stack for row in rows if row.layer is not None}) > 1
    for row in rows:
        lines.setdefault(_label(row, several), {})[row.kind] = row
    page.heading("‖Δ‖/‖base‖ by layer")
    page.table(
        ["layer", *(cell for kind in kinds for cell in (kind, ""))],
        [
            [label, *(c for kind in kinds for c in _cells(cells.get(kind), barred, largest, width))]
            for label, cells in lines.items()
        ],
    )


def _bar_width(page: Page, columns: int) -> int:
    """What the terminal leaves for each bar, after the label and the numbers."""
    if page.width is None:
        return _BAR_IN_A_PIPE
    return max(1, min(_BAR, (page.width - 9) // columns - 12))


def _label(row: LayerRow, several: bool) -> str:
    if row.layer is None:
        return "outside"
    return f"{row.stack} {row.layer}".strip() if several else str(row.layer)


def _cells(
    row: LayerRow | None, barred: Sequence[LayerRow], largest: float, width: int
) -> tuple[str, str]:
    """A number and its bar."""
    if row is None:
        return "", ""
    if row.relative_norm is None:
        return "–", ""
    share = row.relative_norm / largest if largest else 0.0
    return percent(row.relative_norm), bar(share, width) if row in barred else ""


def bar(share: float, width: int) -> str:
    """A bar of block characters, ``share`` of ``width``; anything above zero shows."""
    eighths = math.ceil(share * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
