"""Rows brought together by token: three vocabularies, the tuned model's, its base's and the
target's, and where each row goes. Pure arithmetic on token → row."""

from __future__ import annotations

from collections.abc import Mapping

from hubdiff.errors import VocabularyMismatch
from hubdiff.plan.alignment import ALIGN, JOINED, SAME, TARGET, TUNED, Alignment
from hubdiff.rows import Run, runs_of
from hubdiff.vocab import Vocabulary


class Matching:
    """Of the tuned model's rows ``shared`` have a Δ, and ``own`` behind them are its own; the
    target has ``count``. Rows of the result are found one kind after the other."""

    def __init__(
        self,
        ours: Vocabulary,
        base: Vocabulary,
        theirs: Vocabulary,
        shared: int,
        own: int,
        count: int,
    ) -> None:
        self._ours, self._theirs = ours, theirs
        self._shared, self._end, self._count = shared, shared + own, count
        self._token = {row: token for token, row in ours.rows.items()}
        self._before = {row: token for token, row in base.rows.items()}
        self._used = set(theirs.rows.values())
        self._changed: dict[int, int] = {}
        self._taken: dict[int, int] = {}
        self._taken_in_place = False
        self._added: dict[str, int] = {}
        self._replaced: dict[str, int] = {}
        self._renamed: dict[str, str] = {}
        self._missing: list[str] = []

    def alignment(self) -> Alignment:
        """Raises ``VocabularyMismatch`` where a row can't be had for a token."""
        matched, moved = self._match_shared()
        self._match_renamed()
        self._place_own()
        self._match_unused()
        for row in self._taken:
            self._changed.pop(row, None)
        tokens = {**self._kept_tokens(), **self._added}
        known = {*self._ours.rows, *self._renamed}
        taken = runs_of(self._taken)
        if self._taken_in_place:
            taken = (Run(self._shared, self._shared, self._end - self._shared),)
        return Alignment(
            mode=ALIGN,
            rows=max(self._count, *(run.at + run.count for run in taken), 0),
            target_rows=self._count,
            shared=self._shared,
            changed=runs_of(self._changed),
            taken=taken,
            matched=matched,
            moved=moved,
            added=self._added,
            replaced=self._replaced,
            renamed=self._renamed,
            left=tuple(token for token in self._theirs.rows if token not in known),
            missing=tuple(self._missing),
            tokenizer=self._whose(tokens),
            tokens=tokens,
        )

    def _kept_tokens(self) -> dict[str, int]:
        """The target's vocabulary, with the names that the tune gave."""
        return {self._renamed.get(token, token): row for token, row in self._theirs.rows.items()}

    def _whose(self, tokens: Mapping[str, int]) -> str:
        if tokens == self._ours.rows:
            return SAME if self._ours.rows == self._theirs.rows else TUNED
        return TARGET if tokens == self._theirs.rows else JOINED

    def _match_shared(self) -> tuple[int, int]:
        """Rows that have a Δ, by the tuned model's token. How many find their row, and how many of
        them one of another number."""
        moved = 0
        for row, token in self._token.items():
            at = self._theirs.rows.get(token)
            if row < self._shared and at is not None and at < self._count:
                self._changed[at] = row
                moved += at != row
        return len(self._changed), moved

    def _match_renamed(self) -> None:
        """Rows whose token the target does not know, by the base's, which the tune renamed. A new
        token in a row that has none in the base and none in the target stays there."""
        for row, token in sorted(self._token.items()):
            if row >= self._shared or token in self._theirs.rows:
                continue
            old = self._before.get(row)
            at = None if old is None else self._theirs.rows.get(old)
            if old is None and row < self._count and row not in self._used:
                self._changed[row] = self._added[token] = row
            elif old is None or at is None or at >= self._count or at in self._changed:
                self._missing.append(token)
            else:
                self._changed[at] = row
                self._renamed[old] = token

    def _place_own(self) -> None:
        """The tuned model's own rows: to the row of their token, where the target has it; else to
        the very row they have in the tuned model, if that leaves its vocabulary the result's; else
        to the first rows behind the target's tokens, which is where tokenizers count on."""
        fresh = []
        for row, token in sorted(self._token.items()):
            if row >= self._end:
                self._missing.append(token)
            elif row >= self._shared:
                at = self._theirs.rows.get(token)
                if at is None:
                    fresh.append((row, token))
                elif at >= self._count:
                    self._taken[at], self._added[token] = row, at
                else:
                    self._taken[at], self._replaced[token] = row, at
        tokens = {**self._kept_tokens(), **self._added, **{token: row for row, token in fresh}}
        unused = not any(self._shared <= row < self._end for row in self._used)
        if tokens == self._ours.rows and (not fresh or (unused and self._shared <= self._count)):
            if fresh:
                self._taken_in_place = True
                self._added |= {token: row for row, token in fresh}
                self._changed = {at: r for at, r in self._changed.items() if at < self._shared}
        else:
            self._leave_holes()
            for at, (row, token) in enumerate(fresh, start=self._theirs.size):
                self._taken[at], self._added[token] = row, at
        self._check_rows()

    def _leave_holes(self) -> None:
        """No new token goes to a row between others after all: a tokenizer that is not the tuned
        model's would not count that way."""
        for token, row in list(self._added.items()):
            if row in self._changed:
                del self._changed[row], self._added[token]
                self._missing.append(token)

    def _check_rows(self) -> None:
        """Rows behind the target's must come one after the other."""
        behind = sorted(row for row in self._taken if row >= self._count)
        if behind != list(range(self._count, self._count + len(behind))):
            raise VocabularyMismatch(
                f"the target has {self._count:,} rows, and its tokenizer tokens up to row "
                f"{self._theirs.size - 1:,}: rows between are nobody's",
                next_step="Resize the target first (model.resize_token_embeddings).",
            )

    def _match_unused(self) -> None:
        """Rows without a token in any of the three: padding, by number."""
        for row in range(min(self._shared, self._count)):
            if row not in self._token and row not in self._before and row not in self._used:
                self._changed[row] = row
