"""Can a delta be put on a target? Everything that headers, configs and tokenizers tell, as findings
in words; no weights are read but the few bytes that recognise the own base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hubdiff.checkpoint import Checkpoint
from hubdiff.configs import quantised, tied
from hubdiff.delta import Delta
from hubdiff.errors import CannotApply
from hubdiff.facts import facts
from hubdiff.files import FileTree
from hubdiff.hashing import check_hash, hash_bytes
from hubdiff.licences import Side, conflicts
from hubdiff.names import differs_in_rows_only, match_names
from hubdiff.plan import OWN_BASE, MergePlan, Weighted, make_plan
from hubdiff.plan.alignment import ALIGN, Alignment, tuned_vocabulary
from hubdiff.plan.carried import carried_json
from hubdiff.plan.recognise import same_pin
from hubdiff.vocab import (
    Files,
    chat_template,
    files_of,
    special_tokens,
    vocabulary_of,
)

# What a finding means for putting the delta on the target.
SAME, DIFFERS, DOUBT, STOP, UNKNOWN = "same", "differs", "doubt", "stop", "unknown"
_MOST = 3  # names in one sentence
# Fields of a config that make two models two architectures.
_ARCHITECTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_POSITIONS = ("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``state``: ``same``, ``differs`` (and it does not matter),
    ``doubt``, ``stop`` or ``unknown``; ``text`` says it in words."""

    subject: str
    state: str
    text: str


@dataclass(frozen=True)
class Compatibility:
    """``plan`` is that of the delta on the target; None where it can't be put there, for the reason
    ``stop`` gives."""

    findings: tuple[Finding, ...]
    plan: MergePlan | None
    stop: CannotApply | None

    @property
    def own_base(self) -> bool:
        return self.plan is not None and self.plan.case == OWN_BASE


def compatibility(delta: Delta, target: Checkpoint, vocab: str | None = None) -> Compatibility:
    """Look at everything but weights; ``vocab`` as ``make_plan`` takes it. Raises
    ``HubdiffError`` only for files that can't be read."""
    plan = stop = None
    try:
        plan = make_plan([Weighted(delta)], target, vocab=vocab)
    except CannotApply as error:
        stop = error
    findings = list(findings_on(delta, target, plan))
    if stop is not None:
        findings.append(Finding("plan", STOP, str(stop)))
    return Compatibility(tuple(findings), plan, stop)


def findings_on(delta: Delta, target: Checkpoint, plan: MergePlan | None) -> list[Finding]:
    """Every subject, compared. ``plan`` None: there can be none."""
    return _Comparison(delta, target).findings(plan)


class _Comparison:
    """A delta and a target, subject by subject."""

    def __init__(self, delta: Delta, target: Checkpoint) -> None:
        self._delta, self._target = delta, target
        self._manifest = delta.manifest
        records = [record for record in self._manifest.tensors if not record.added]
        self._records = {record.name: record for record in records}
        self._pairs = match_names(list(self._records), target.tensors).pairs
        self._alignment: Alignment | None = None

    def findings(self, plan: MergePlan | None) -> list[Finding]:
        self._alignment = plan.alignment_of(self._delta) if plan is not None else None
        return [
            self._base(plan),
            self._names(),
            self._shapes(),
            self._dtypes(),
            self._ties(),
            self._architecture(),
            self._positions(),
            self._tokens(),
            self._specials(),
            self._template(),
            self._quantisation(plan),
            self._licence(),
            self._gating(),
        ]

    def _base(self, plan: MergePlan | None) -> Finding:
        base, pin = self._manifest.base, self._target.tree.pin
        if plan is not None and plan.case == OWN_BASE:
            named = same_pin(base, pin)
            other = "" if named else f", under another name than {base.name}"
            return Finding("own base", SAME, f"yes: {plan.reason.partition(': ')[2]}{other}")
        why = plan.reason.partition(": ")[2] if plan is not None else "see below"
        return Finding("own base", DIFFERS, f"no: {why}")

    def _names(self) -> Finding:
        total = len(self._records)
        missing = [name for name in self._records if name not in self._pairs]
        extra = set(self._target.tensors) - set(self._pairs.values())
        if not missing and not extra:
            return Finding("tensor names", SAME, f"all {total:,} have a partner in the target")
        texts = [f"{len(self._pairs):,} of {total:,} have a partner in the target"]
        if missing:
            texts.append(f"without: {_some(missing)}")
        if extra:
            texts.append(f"only in the target: {_some(sorted(extra))}")
        alone = [name for name in missing if name not in self._manifest.aliases]
        changed = any(self._records[name].portable for name in alone)
        return Finding("tensor names", DOUBT if changed else DIFFERS, "; ".join(texts))

    def _shapes(self) -> Finding:
        unlike = {
            name: f"{name} {list(self._records[name].shape)} and {list(entry.shape)}"
            for name, other in self._pairs.items()
            if (entry := self._target.tensors[other].entry).shape != self._records[name].shape
        }
        if unlike:
            text = f"{len(unlike):,} differ: {_some(list(unlike.values()))}"
            if self._alignment is not None and all(map(self._differs_in_rows, unlike)):
                return Finding("shapes", DIFFERS, f"{text}, in rows of the vocabulary only")
            return Finding("shapes", DOUBT, text)
        return Finding("shapes", SAME, "all alike")

    def _differs_in_rows(self, name: str) -> bool:
        theirs = self._target.tensors[self._pairs[name]].entry.shape
        return differs_in_rows_only(name, self._records[name].shape, theirs)

    def _dtypes(self) -> Finding:
        ours = {self._records[name].base_dtype for name in self._pairs}
        theirs = {self._target.tensors[other].entry.dtype for other in self._pairs.values()}
        both = [", ".join(sorted(filter(None, side))) for side in (ours, theirs)]
        if ours == theirs:
            return Finding("dtypes", SAME, both[0])
        return Finding("dtypes", DIFFERS, f"{both[0]} in the base, {both[1]} in the target")

    def _ties(self) -> Finding:
        ours, theirs = tied(self._config("base")), tied(self._target.config)
        words = {True: "tied", False: "not tied", None: "not said to be tied"}
        text = f"head and embedding are {words[ours]} in the base, {words[theirs]} in the target"
        if ours == theirs:
            return Finding("tied weights", SAME, f"head and embedding are {words[ours]} in both")
        return Finding("tied weights", UNKNOWN if None in (ours, theirs) else DOUBT, text)

    def _config(self, side: str) -> Mapping[str, Any]:
        return carried_json(self._delta, f"{side}/config.json")

    def _architecture(self) -> Finding:
        ours, theirs = self._config("base"), self._target.config
        if not ours or not theirs:
            return Finding("architecture", UNKNOWN, "no config.json on both sides")
        both = [name for name in _ARCHITECTURE if name in ours and name in theirs]
        unlike = _unlike(ours, theirs, both)
        if unlike:
            return Finding("architecture", DOUBT, "; ".join(unlike))
        return Finding("architecture", SAME, str(theirs.get("model_type", "the same fields")))

    def _positions(self) -> Finding:
        """What rope and context length say: weights trained for other positions still add."""
        ours = self._config("base")
        if not ours or not self._target.config:
            return Finding("positions", UNKNOWN, "no config.json on both sides")
        unlike = _unlike(ours, self._target.config, _POSITIONS)
        if unlike:
            return Finding("positions", DIFFERS, f"{'; '.join(unlike)}: the target's are kept")
        return Finding("positions", SAME, "the same fields")

    def _tokens(self) -> Finding:
        ours, theirs = tuned_vocabulary(self._delta), vocabulary_of(self._target.tree)
        if ours is None or theirs is None:
            whose = "the delta's" if ours is None else "the target's"
            return Finding("tokens", UNKNOWN, f"{whose} tokenizer can't be read")
        if self._alignment is not None and self._alignment.mode == ALIGN:
            few = 2 * self._alignment.matched < len(ours.rows)
            return Finding("tokens", DOUBT if few else DIFFERS, str(self._alignment))
        if ours.rows == theirs.rows:
            return Finding("tokens", SAME, f"{ours.size:,}, each for the same row")
        moved = [t for t, row in ours.rows.items() if theirs.rows.get(t, row) != row]
        ours_only = [t for t in ours.rows if t not in theirs.rows]
        theirs_only = [t for t in theirs.rows if t not in ours.rows]
        texts = [
            f"{len(found):,} {words} ({_some([repr(token) for token in found])})"
            for found, words in (
                (moved, "stand for other rows in the target"),
                (ours_only, "only in the tuned model"),
                (theirs_only, "only in the target"),
            )
            if found
        ]
        return Finding("tokens", DOUBT, "; ".join(texts))

    def _specials(self) -> Finding:
        ours, theirs = (special_tokens(files) for files in self._files())
        unlike = _unlike(ours, theirs, sorted({*ours, *theirs}))
        if unlike:
            text = f"{'; '.join(unlike)} (tuned, target)"
            return Finding("special tokens", DIFFERS, text)
        return Finding("special tokens", SAME, ", ".join(theirs.values()) or "none named")

    def _template(self) -> Finding:
        ours, theirs = (chat_template(files) for files in self._files())
        if ours == theirs:
            return Finding("chat template", SAME, "the same" if ours else "none")
        text = {
            (True, False): "only the tuned model has one: it goes with the result",
            (False, True): "only the target has one: it is kept",
            (True, True): "they differ: the tuned one goes with the result",
        }[ours is not None, theirs is not None]
        return Finding("chat template", DIFFERS, text)

    def _files(self) -> tuple[Files, Files]:
        return tuned_files(self._delta, self._target.tree), files_of(self._target.tree)

    def _quantisation(self, plan: MergePlan | None) -> Finding:
        method, reason = quantised(self._target.config), self._manifest.not_portable_reason
        if plan is not None and plan.case == OWN_BASE:
            return Finding("quantisation", SAME, method or "none")
        if method:
            return Finding("quantisation", STOP, f"the target's weights are quantised ({method})")
        if reason:
            return Finding("quantisation", STOP, reason)
        return Finding("quantisation", SAME, "none")

    def _licence(self) -> Finding:
        known = [
            ("base", self._manifest.base.licence),
            ("tuned model", self._manifest.tuned.licence),
            ("target", facts(self._target.tree).licence),
        ]
        text = ", ".join(f"{side} {licence or 'none stated'}" for side, licence in known)
        against = conflicts([Side(side, licence) for side, licence in known])
        if against:
            return Finding("licence", DOUBT, "; ".join(against))
        found = {licence for _, licence in known}
        if None in found:
            return Finding("licence", UNKNOWN, text)
        return Finding("licence", SAME if len(found) == 1 else DIFFERS, text)

    def _gating(self) -> Finding:
        known = [
            ("base", self._manifest.base.gated),
            ("tuned model", self._manifest.tuned.gated),
            ("target", facts(self._target.tree).gated),
        ]
        gated = [side for side, is_gated in known if is_gated]
        if gated:
            return Finding("gating", DIFFERS, f"gated: {', '.join(gated)}; their terms hold here")
        return Finding("gating", SAME, "nothing is gated")


def _some(names: list[str]) -> str:
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {more:,} more" if more > 0 else "")


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [
        f"{name} {_shown(ours.get(name))} and {_shown(theirs.get(name))}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _shown(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- the side files of the tuned model ---


def tuned_files(delta: Delta, target: FileTree) -> Files:
    """A tuned model's side files as far as they can be had: those that the delta carries, and those
    of the base that the target has too, known by content."""
    tuned = {file.path: file for file in delta.manifest.tuned_files}

    def read(path: str) -> bytes | None:
        file = tuned.get(path)
        if file is None:
            return None
        if file.source == "delta":
            data = delta.tree.read_bytes(f"tuned/{path}")
            check_hash(hash_bytes(data), file.sha256, f"{delta.tree.pin}/tuned/{path}")
            return data
        info = target.files().get(path)
        if info is None or info.size != file.size:
            return None
        data = target.read_bytes(path)
        return data if hash_bytes(data) == file.sha256 else None

    return read
