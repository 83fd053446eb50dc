"""Model cards: README.md of a delta repo and of a result, rendered from templates/.

Everything a card says was measured or is in the manifest; nothing is left to be filled in. Names
and reasons in a manifest were written by others: they go through ``markdown.py`` on their way in.
Jinja2 and PyYAML are imported late.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubdiff import markdown
from hubdiff._version import __version__
from hubdiff.facts import STARTED_FROM
from hubdiff.licences import (
    HUB_LICENCES,
    Side,
    conflicts,
    licence_note,
    notices,
    strictest,
)
from hubdiff.registry_tags import DELTA_TAG, START, TUNED_MODEL
from hubdiff.summary import Summary, percent, size_text, summarise

if TYPE_CHECKING:
    import jinja2

PICTURE = "layers.png"
_FILES_SHOWN = 5
_ERRORS_SHOWN = 10
_TOKENS_SHOWN = 20
_TOKEN_ROWS = (
    ("added", "added: new in the tuned model"),
    ("replaced", "new in the tuned model, whose own row replaces the target's"),
    ("renamed", "renamed, as the tune did"),
    ("left", "left as in the target: the tuned model does not know them"),
    ("missing", "of the tuned model, without a row in the target"),
)


def template(name: str) -> str:
    """The text of a template: from inside an installed package, or from beside a source checkout's
    package folder."""
    package = Path(__file__).parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise FileNotFoundError(f"hubdiff was installed without its template {name}: reinstall it")


def delta_card(
    manifest: Mapping[str, Any],
    *,
    repo: str | None,
    name: str | None = None,
    tuned_card: Mapping[str, Any] | None = None,
    base_card: Mapping[str, Any] | None = None,
    measurements: Mapping[str, str] | None = None,
    picture: str | None = PICTURE,
) -> str:
    """The card of a delta.

    ``repo`` is where it is published; None for a folder, which ``name`` then calls. The two cards
    are the metadata of the tuned model's and the base's own README (licence name, task, language).
    ``measurements`` are more rows for the table of numbers, as label → value. ``picture`` is the
    path of the per-layer picture in the repo, or None when there is none.
    """
    base, tuned = _side(manifest, "base"), _side(manifest, "tuned")
    master = _side(manifest, "master") if manifest.get("master") else None
    start = _side(manifest, "started_from") if manifest.get("started_from") else None
    parents = [
        _Parent("base", base, base_card or {}),
        _Parent("tuned model", tuned, tuned_card or {}),
        _Parent("master of the tuned model", master or {}),
    ]
    title, filters = repo or name or "delta", manifest.get("filters")
    rebuilds = not (filters or manifest.get("adapter") or manifest.get("lossy"))
    metadata = {
        **_licence(parents),
        **_task(tuned_card),
        "library_name": "hubdiff",
        "tags": ["hubdiff", DELTA_TAG, *_tag(TUNED_MODEL, tuned), *_tag(START, start or {})],
        **_parents([base], "adapter"),
    }
    return _render(
        "delta_card.md",
        metadata,
        title=title,
        published=repo is not None,
        base=base,
        tuned=tuned,
        master=master,
        start=start,
        portable=manifest.get("portable") is not False,
        not_portable_reason=manifest.get("not_portable_reason"),
        partial=bool(filters),
        adapter=manifest.get("adapter") is not None,
        lossy=manifest.get("lossy"),
        errors=_worst_errors(manifest),
        include=(filters or {}).get("include") or (),
        exclude=(filters or {}).get("exclude") or (),
        shell=_shell(_here(repo, name), _ref(base), "./restored" if rebuilds else "./result"),
        python=f"import hubdiff\n\nmodel = hubdiff.load({_here(repo, name)!r}, {_ref(base)!r})",
        numbers=[
            *_numbers(summarise(manifest)),
            *_cut_rows(manifest),
            *(measurements or {}).items(),
        ],
        picture=picture,
        not_carried=_by_reason(tuned.get("not_carried") or ()),
        **_licence_words(parents),
        provenance=manifest.get("provenance"),
    )


def result_card(
    record: Mapping[str, Any],
    *,
    repo: str | None,
    name: str | None = None,
    tuned_cards: Sequence[Mapping[str, Any]] = (),
    target_card: Mapping[str, Any] | None = None,
) -> str:
    """The card of a result: a target with one delta or several added.

    ``record`` is ``hubdiff-result.json``. Read here, each of them optional: ``target`` and
    ``deltas``, each with its ``weight``, ``base`` and ``tuned`` (all with repo, commit, name;
    licence and gated for models), ``scale``, ``method``, ``command`` (a list of arguments),
    ``side_files`` (path, source, note), ``left_out`` (path, reason), ``notes`` (lines about merged
    configs), ``added`` and ``kept`` (tensor names), ``check`` (verdict, reasons),
    ``vocabulary`` (for each delta what became of its tokens, or null). ``tuned_cards``
    are the metadata of the tuned models' own cards, in the order of the deltas; task and language
    are the first one's.
    """
    target, deltas = _side(record, "target"), [dict(delta) for delta in record.get("deltas") or ()]
    cards = [*tuned_cards, *({} for _ in deltas[len(tuned_cards) :])]
    parents = [_Parent("target", target, target_card or {})]
    for delta, card in zip(deltas, cards, strict=True):
        of = f" of {delta.get('repo') or delta.get('name')}" if len(deltas) > 1 else ""
        parents.append(_Parent(f"tuned model{of}", _side(delta, "tuned"), card))
        parents.append(_Parent(f"base{of or ' of the delta'}", _side(delta, "base")))
    tuned_card = next(iter(cards), {})
    command = record.get("command")
    metadata = {
        **_licence(parents),
        **_task(tuned_card),
        "library_name": _library(tuned_card),
        "tags": ["hubdiff", "merge"],
        **_parents([target, *deltas], "merge"),
    }
    return _render(
        "result_card.md",
        metadata,
        title=repo or name or "result",
        deltas=deltas,
        target=target,
        scale=_scale_text(record.get("scale", 1.0)),
        method=record.get("method"),
        command=command if isinstance(command, str | None) else shlex.join(map(str, command)),
        side_files=record.get("side_files") or (),
        left_out=_by_reason(record.get("left_out") or ()),
        notes=record.get("notes") or (),
        check=record.get("check") or {"verdict": "go", "reasons": ()},
        vocabulary=_vocabulary(record),
        added=record.get("added") or (),
        kept=record.get("kept") or (),
        **_licence_words(parents),
    )


def tuned_card(
    record: Mapping[str, Any],
    *,
    name: str,
    base_card: Mapping[str, Any] | None = None,
) -> str:
    """The card of a fine-tune. ``record`` has ``base`` and ``delta`` (or null) with repo, commit,
    name, licence and gated, the delta also ``closed``; ``data``, ``examples``, ``recipe``,
    ``libraries`` (name → version), ``losses``, ``picture``, ``command`` (a list of arguments) and
    ``master``."""
    base = _side(record, "base")
    delta = _side(record, "delta") if record.get("delta") else None
    parents = [_Parent("base", base, base_card or {}), _Parent("delta", delta or {})]
    recipe = dict(record["recipe"])
    settings = [
        (key.replace("_", " "), value) for key, value in recipe.items() if value is not None
    ]
    settings += [("made with", ", ".join(f"{k} {v}" for k, v in record["libraries"].items()))]
    command = record.get("command")
    metadata = {
        **_licence(parents),
        **_task(base_card),
        "library_name": _library(base_card),
        "tags": ["hubdiff", "generated_from_trainer", *_tag(START, delta or {})],
        **_parents([base], "adapter" if recipe.get("lora") else "finetune"),
        STARTED_FROM: delta and {key: delta[key] for key in ("name", "repo", "commit", "closed")},
    }
    return _render(
        "tuned_card.md",
        metadata,
        title=name,
        base=base,
        delta=delta,
        data=record["data"],
        examples=record["examples"],
        recipe=recipe,
        settings=settings,
        losses=record["losses"],
        picture=record["picture"],
        command=shlex.join(map(str, command)) if command else None,
        master=record["master"],
    )


def page(name: str, **values: Any) -> str:
    """A page of Markdown, which is no card: the template of that name with its values."""
    return _body(name, values)


def _render(name: str, metadata: Mapping[str, Any], **values: Any) -> str:
    import yaml

    body = _body(name, values)
    # huggingface_hub.ModelCardData holds the same; to import it takes longer than all of this.
    known = {key: value for key, value in metadata.items() if value is not None}
    head = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body}"


def _body(name: str, values: Mapping[str, Any]) -> str:
    return f"{_compiled(name).render(**values).strip()}\n"


@cache
def _compiled(name: str) -> jinja2.Template:
    import jinja2

    # Markdown, not HTML: escaping is markdown.py's, called by name in the templates.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    ours = {
        "text": markdown.text,
        "code": markdown.code,
        "block": markdown.block,
        "source": _source,
        "size": size_text,
        "percent": percent,
        "version": __version__,
    }
    return environment.from_string(template(name), globals=ours)


def _vocabulary(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each delta whose rows were aligned: a title, whose tokenizer the result has, and a table
    of label, count, a few tokens with what is to be said of each."""
    found = []
    deltas = record.get("deltas") or ()
    for delta, one in zip(deltas, record.get("vocabulary") or (), strict=False):
        if one is None:
            continue
        tokens = {name: one[name]["tokens"] for name, _ in _TOKEN_ROWS}
        moved = f"{one['moved']:,} of them in another row" if one["moved"] else ""
        matched = "matched: Δ is on their row"
        rows: list[tuple[str, int, list[str], str]] = [(matched, one["matched"], [], moved)]
        for name, label in _TOKEN_ROWS:
            shown = list(tokens[name])[:_TOKENS_SHOWN]
            more = one[name]["count"] - len(shown)
            rest = f"and {more:,} more" if more > 0 else ""
            if shown:
                rows.append((label, one[name]["count"], shown, rest))
        found.append(
            {
                "delta": delta if len(deltas) > 1 else None,
                "by_token": one["mode"] == "align",
                "text": one["text"],
                "tokenizer": one["tokenizer"],
                "rows": rows,
            }
        )
    return found


# --- what a card is made of ---------------------------------------------------------------------


def _side(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(holder.get(name) or {})


def _source(side: Mapping[str, Any]) -> str:
    """A model as Markdown: a link to its pinned commit, or the name of a folder."""
    if side.get("repo"):
        return markdown.repo_link(str(side["repo"]), side.get("commit"))
    return f"{markdown.code(side.get('name') or 'unnamed')} (a local folder)"


def _here(repo: str | None, name: str | None) -> str:
    return repo or f"./{name or 'delta'}"


def _ref(side: Mapping[str, Any]) -> str:
    """What a user writes to mean exactly this model."""
    if not side.get("repo"):
        return f"./{side.get('name') or 'base'}"
    return f"{side['repo']}@{side['commit']}" if side.get("commit") else str(side["repo"])


def _shell(delta: str, base: str, output: str) -> str:
    delta, base = (shlex.quote(markdown.one_line(ref)) for ref in (delta, base))
    return f"pip install hubdiff\nhubdiff apply {delta} --to {base} --output {output}"


@dataclass(frozen=True)
class _Parent:
    """A model that a delta or a result inherits from: how a sentence calls it, its entry in the
    manifest, the metadata of its card."""

    name: str
    model: Mapping[str, Any]
    card: Mapping[str, Any] = field(default_factory=dict)


def _sides(parents: Sequence[_Parent]) -> list[Side]:
    """Who hands down a licence. A folder that states none is its owner's own work: what binds it
    comes from the others."""
    return [
        Side(parent.name, parent.model.get("licence") or None, bool(parent.model.get("gated")))
        for parent in parents
        if parent.model.get("repo") or parent.model.get("licence")
    ]


def _licence_words(parents: Sequence[_Parent]) -> dict[str, Any]:
    sides = _sides(parents)
    return {
        "licences": licence_note(sides),
        "notices": notices([*(side.licence for side in sides), *_own_names(parents)]),
        "conflicts": conflicts(sides),
    }


def _own_names(parents: Sequence[_Parent]) -> list[str]:
    """The names of licences that the Hub has no id for."""
    names = (parent.card.get("license_name") for parent in parents)
    return [name for name in names if isinstance(name, str)]


def _licence(parents: Sequence[_Parent]) -> dict[str, Any]:
    """The strictest licence. One the Hub has no id for is ``other`` there, with name and link."""
    strict = strictest(side.licence for side in _sides(parents))
    if strict.lower() in HUB_LICENCES - {"other"}:
        return {"license": strict.lower()}
    if strict != "other":
        return {"license": "other", **_licence_name(strict)}
    for parent in parents:
        name = parent.card.get("license_name")
        if parent.model.get("licence") == strict and isinstance(name, str):
            link = _absolute(parent.card.get("license_link"), parent.model)
            linked = {"license_link": link} if link is not None else {}
            return {"license": strict, **_licence_name(name), **linked}
    return {"license": strict}


def _licence_name(text: str) -> dict[str, str]:
    """The Hub takes names of small letters, digits, dots and dashes."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    return {"license_name": name} if name else {}


def _absolute(link: object, model: Mapping[str, Any]) -> str | None:
    """A licence link seen from another repo: a file name becomes the file at the pinned commit."""
    if not isinstance(link, str) or re.search(r"\s", link):
        return None
    if link.startswith(("https://", "http://")):
        return link
    if ":" in link or not markdown.is_repo_id(model.get("repo")):
        return None
    return f"https://huggingface.co/{model['repo']}/blob/{model.get('commit') or 'main'}/{link}"


def _scale_text(scale: float | Mapping[str, float]) -> str:
    if not isinstance(scale, Mapping):
        return str(scale)
    return ", ".join(f"{value} for {glob}" for glob, value in scale.items())


def _task(card: Mapping[str, Any] | None) -> dict[str, Any]:
    """Task and language, taken over from the tuned model's card where they are well-formed."""
    said: dict[str, Any] = {}
    task, language = (card or {}).get("pipeline_tag"), (card or {}).get("language")
    if isinstance(task, str) and re.fullmatch(r"[a-z0-9-]+", task):
        said["pipeline_tag"] = task
    languages = [language] if isinstance(language, str) else language
    if isinstance(languages, list) and languages:
        known = [x for x in languages if isinstance(x, str) and re.fullmatch(r"[A-Za-z-]+", x)]
        if len(known) == len(languages):
            said["language"] = known
    return said


def _library(card: Mapping[str, Any] | None) -> str:
    name = (card or {}).get("library_name")
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) else "transformers"


def _parents(models: Sequence[Mapping[str, Any]], relation: str) -> dict[str, Any]:
    """Lineage as the Hub reads it. A folder has no id there."""
    repos = [model["repo"] for model in models if markdown.is_repo_id(model.get("repo"))]
    return {"base_model": repos, "base_model_relation": relation} if repos else {}


def _tag(name: str, side: Mapping[str, Any]) -> list[str]:
    """By which the deltas of a tuned model, or those that training from a delta gave, are found:
    ``base_model`` is their base."""
    repo = side.get("repo")
    return [f"{name}:{repo}"] if markdown.is_repo_id(repo) else []


def _numbers(summary: Summary) -> list[tuple[str, str]]:
    """The table of measured numbers, as label and value."""
    rows = [("Delta", size_text(summary.delta_bytes))]
    if summary.size_share is not None:
        rows.append(("Tuned weights", size_text(summary.tuned_bytes)))
        rows.append(("Delta / tuned weights", percent(summary.size_share)))
    exact = size_text(summary.exact_bytes) if summary.exact_bytes else "none needed"
    rows.append(("Exact layer (own base only)", exact))
    if summary.encodings:
        used = ", ".join(f"{name} ({size_text(size)})" for name, size in summary.encodings.items())
        rows.append(("Encodings", used))
    rows.append(
        (
            "Tensors",
            f"{summary.changed} changed, {summary.unchanged} unchanged, {summary.added} added, "
            f"{summary.removed} removed",
        )
    )
    if summary.unchanged_share is not None:
        rows.append(("Elements left as they were", percent(summary.unchanged_share)))
    if summary.relative_norm is not None:
        rows.append(("‖Δ‖ / ‖base‖", percent(summary.relative_norm)))
    return rows


def _cut_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many rows the tuned model's vocabulary has, where its base has another number, or other
    tokens in them."""
    shapes = {t.get("name"): t.get("shape") or [0] for t in manifest.get("tensors") or ()}
    for name, cut in (manifest.get("rows") or {}).items():
        own = (shapes.get(f"{name}[{cut['shared']}:]") or [0])[0]
        base = f" of {cut['base']:,}" if cut.get("base") is not None else ""
        text = f"{cut['shared'] + own:,}: {cut['shared']:,} compared with the base's{base}"
        return [("Rows of the vocabulary", f"{text}, {own:,} kept as they are")]
    return []


def _worst_errors(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What truncation cost, tensor by tensor: those that lost most, and how many more there are."""
    found = [
        {"name": tensor.get("name"), **part["low_rank"]}
        for tensor in manifest.get("tensors") or ()
        for part in tensor.get("parts") or ()
        if part.get("low_rank")
    ]
    return sorted(found, key=lambda item: -item["error"])[:_ERRORS_SHOWN]


def _by_reason(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Files left behind, one row per reason: the first few names, how many more, their size."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for file in files:
        groups.setdefault(str(file.get("reason")), []).append(file)
    return [
        {
            "reason": reason,
            "paths": [str(file.get("path")) for file in members[:_FILES_SHOWN]],
            "more": max(0, len(members) - _FILES_SHOWN),
            "size": sum(file.get("size") or 0 for file in members),
        }
        for reason, members in groups.items()
    ]
