"""``hubdiff diff``: what changed between two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hubdiff.cli import _command as shared
from hubdiff.cli._output import Page, Session, pass_session
from hubdiff.summary import percent

if TYPE_CHECKING:
    from hubdiff.difference import TensorChange
    from hubdiff.jobs.diff import Change, Diff

_MOST_TENSORS = 12


@click.command(
    "diff",
    short_help="Say what changed between two models.",
    cls=shared.Command,
    usage="OLD NEW [OPTIONS]",
    examples=(
        "hubdiff diff org/base org/base-v2",
        "hubdiff diff org/base me/tuned --plot changes.png",
        "hubdiff diff ./before ./after --json",
    ),
)
@click.argument("old")
@click.argument("new")
@click.option("--plot", metavar="FILE", help="Draw ‖Δ‖/‖old‖ by layer, as a PNG.")
@shared.cache
@shared.json_output
@pass_session
def command(session: Session, old: str, new: str, plot: str | None, cache: bool) -> None:
    """Say what changed from OLD to NEW: how far and in how many directions every tensor moved, and
    what is different in configs, tokenizers and other files.

    Reads both models whole, in bounded memory; publishes nothing. rank is the number of directions
    that Δ is made of, an estimate (the participation ratio of its singular values).
    """
    from hubdiff.jobs.diff import diff

    with session.working() as progress:
        found = diff(old, new, plot=plot, cache=cache, progress=progress)
    session.show(found.as_json(), lambda page: _draw(page, found, plot))


def _draw(page: Page, found: Diff, plot: str | None) -> None:
    total = found.total
    page.fields(
        [
            ("old", found.old),
            ("new", found.new),
            ("same", "yes: every weight, config and file" if found.same else None),
            ("tensors", _tensors(found)),
            ("‖Δ‖/‖old‖", _share(total["relative_norm"])),
            ("cosine", _number(total["cosine"])),
            ("unchanged", f"{_share(total['unchanged_share'])} of the weights"),
            ("picture", plot),
        ]
    )
    if found.changed:
        _draw_layers(page, found)
        _draw_tensors(page, found.changed)
    for title, texts in (
        ("Only in the new model", list(found.added)),
        ("Only in the old model", list(found.removed)),
        ("Other shapes", _changes(found.unlike)),
        ("Config", _changes(found.config)),
        ("Tokenizer", _changes(found.tokenizer)),
        ("Files", [f"{path}: {what}" for path, what in found.files]),
    ):
        if texts:
            page.heading(f"{title} ({len(texts):,})")
            page.items(texts)


def _tensors(found: Diff) -> str:
    return (
        f"{len(found.changed):,} changed, {len(found.tensors) - len(found.changed):,} unchanged, "
        f"{len(found.added):,} added, {len(found.removed):,} removed"
    )


def _draw_layers(page: Page, found: Diff) -> None:
    page.heading("By layer and kind")
    page.table(
        ["layer", "kind", "‖Δ‖/‖old‖", "changed"],
        [
            (
                "outside" if row.layer is None else f"{row.stack} {row.layer}".strip(),
                row.kind,
                _share(row.relative_norm),
                _share(row.changed / row.elements if row.elements else None),
            )
            for row in found.layers
            if row.changed
        ],
    )


def _draw_tensors(page: Page, changed: Sequence[TensorChange]) -> None:
    most = sorted(changed, key=lambda t: -(t.delta_norm / t.old_norm if t.old_norm else 0.0))
    page.heading("The tensors that moved most")
    page.table(
        ["tensor", "‖Δ‖/‖old‖", "cosine", "changed", "rank", "of"],
        [
            (
                tensor.name,
                _share(tensor.delta_norm / tensor.old_norm if tensor.old_norm else None),
                _number(tensor.cosine),
                _share(tensor.changed / tensor.elements),
                "–" if tensor.rank is None else f"{tensor.rank:.0f}",
                str(min(tensor.shape[0], _columns(tensor))) if len(tensor.shape) > 1 else "–",
            )
            for tensor in most[:_MOST_TENSORS]
        ],
    )


def _columns(tensor: TensorChange) -> int:
    return tensor.elements // tensor.shape[0]


def _changes(changes: Sequence[Change]) -> list[str]:
    return [f"{c.what}: {_side(c.old)} → {_side(c.new)}" for c in changes]


def _side(value: str | None) -> str:
    return "–" if value is None else value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)
