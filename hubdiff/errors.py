"""Every error hubdiff raises on purpose.

A message says what is wrong and where; ``next_step`` says what to do about it. The library raises
these, the command line prints them, and nothing else in hubdiff prints or exits.

HubdiffError
├── RefError                 a ref that can't be read ("org/name@rev", a path, …)
├── HubError                 the Hub said no, or said nothing
│   ├── RepoNotFound         no such repo, or it is private and no token sees it
│   ├── GatedRepo            its terms must be accepted first
│   ├── RevisionNotFound     no such branch, tag or commit
│   ├── RemoteFileNotFound   the repo has no such file
│   ├── AuthError            no token, or one that is not accepted
│   ├── HubConflict          someone else committed first, or the repo already exists
│   └── HubUnavailable       still failing after the retries (429, 5xx, resets, short bodies)
├── CheckpointError          a model whose files can't be trusted or read
│   ├── BadSafetensors       a header or an offset that is wrong
│   ├── BadIndex             an index that does not match its shards
│   └── NoWeights            no safetensors weights (pickle only, an adapter, another format, …)
├── DeltaError               a delta that can't be trusted or read
│   ├── NotADelta            a model or something else was given where a delta is expected
│   ├── IsADelta             a delta was given where a model is expected
│   ├── NewerFormat          written by a newer hubdiff
│   ├── BadManifest          hubdiff.json with a missing or wrong field
│   └── CorruptPayload       encoded bytes that don't decode to what was declared
├── IntegrityError           bytes whose hash is not the expected one
│   └── BadSignature         not signed, or not by whom it should be
├── NotWorthIt               a delta hardly smaller than the model itself
├── CannotDiff               two models that have no difference hubdiff can express
├── CannotApply              a delta and a target that don't go together
│   ├── ShapeMismatch        one tensor, two shapes
│   ├── VocabularyMismatch   embedding rows that don't match
│   ├── NamesMismatch        tensors that can't be matched by name
│   ├── NotPortable          only the own base will do (quantised weights, raw bits)
│   ├── NotAdvised           a target so far from the delta's base that the result would be noise
│   └── WrongBase            an own-base rebuild asked for on something else
├── CannotExport             a delta that the wanted format can't express
├── RankLost                 another of the processes that torchrun started failed or is gone
└── OutputError              the place to write to
    ├── OutputExists         it holds something already
    ├── DiskFull             no room left
    └── UnsafePath           a file name that would leave its folder
"""

from __future__ import annotations

from typing import Any


class HubdiffError(Exception):
    """Base of all. ``str()`` is the message; ``next_step`` is one sentence of advice, or None."""

    def __init__(self, message: str, *, next_step: str | None = None) -> None:
        super().__init__(message)
        self.next_step = next_step


class RefError(HubdiffError):
    pass


class HubError(HubdiffError):
    pass


class RepoNotFound(HubError):
    pass


class GatedRepo(HubError):
    pass


class RevisionNotFound(HubError):
    pass


class RemoteFileNotFound(HubError):
    pass


class AuthError(HubError):
    pass


class HubConflict(HubError):
    pass


class HubUnavailable(HubError):
    pass


class CheckpointError(HubdiffError):
    pass


class BadSafetensors(CheckpointError):
    pass


class BadIndex(CheckpointError):
    pass


class NoWeights(CheckpointError):
    pass


class DeltaError(HubdiffError):
    pass


class NotADelta(DeltaError):
    pass


class IsADelta(DeltaError):
    pass


class NewerFormat(DeltaError):
    pass


class BadManifest(DeltaError):
    pass


class CorruptPayload(DeltaError):
    pass


class IntegrityError(HubdiffError):
    pass


class BadSignature(IntegrityError):
    pass


class NotWorthIt(HubdiffError):
    pass


class CannotDiff(HubdiffError):
    pass


class CannotApply(HubdiffError):
    pass


class ShapeMismatch(CannotApply):
    pass


class VocabularyMismatch(CannotApply):
    pass


class NamesMismatch(CannotApply):
    pass


class NotPortable(CannotApply):
    pass


class NotAdvised(CannotApply):
    pass


class WrongBase(CannotApply):
    pass


class CannotExport(HubdiffError):
    pass


class RankLost(HubdiffError):
    """``cause`` is what the rank that failed said itself, where it could: ``rank``, ``type``,
    ``message`` and ``next_step``."""

    def __init__(
        self, message: str, *, next_step: str | None = None, cause: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.cause = cause


class OutputError(HubdiffError):
    pass


class OutputExists(OutputError):
    pass


class DiskFull(OutputError):
    pass


class UnsafePath(OutputError):
    pass
