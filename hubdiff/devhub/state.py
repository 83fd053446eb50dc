"""What every handler works on: one server's folder, repos, objects, keys, log and faults."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .faults import Faults
from .log import RequestLog
from .objects import Objects
from .signing import Signer
from .store import Store
from .xet_store import XetStore


@dataclass(frozen=True)
class Options:
    """Sizes are in bytes. ``large_file_bytes``: from this size on, a file is kept out of git."""

    large_file_bytes: int = 10_000_000
    part_bytes: int = 16_000_000
    page_size: int = 100
    url_seconds: float = 3600
    xet_downloads: bool = False


@dataclass
class Hub:
    folder: Path
    users: Mapping[str, str]
    orgs: Mapping[str, Sequence[str]]
    options: Options
    url: str
    cdn_url: str
    log: RequestLog = field(default_factory=RequestLog)
    faults: Faults = field(default_factory=Faults)
    signer: Signer = field(default_factory=Signer)
    collections_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.store = Store(self.folder, self.users, self.orgs)
        self.objects = Objects(self.folder)
        self.xet = XetStore(self.folder, self.objects)
