"""Artifacts in a folder, in the layout of actions/upload-artifact and actions/download-artifact:
what is kept begins below the part of a path that has no wildcard; a name may be taken only once."""

import fnmatch
import os
import shutil
import sys
from itertools import product
from pathlib import Path
from re import split

KEPT = Path(os.environ["ACT_ARTIFACTS"])


def fixed(pattern: str) -> Path:
    parts = Path(pattern).parts
    wild = next((i for i, part in enumerate(parts) if "*" in part), len(parts))
    return Path(*parts[:wild])


def upload() -> None:
    place = KEPT / os.environ["NAME"]
    patterns = os.environ["FOUND"].split()
    roots = {fixed(pattern) for pattern in patterns}
    root = Path(os.path.commonpath(roots))
    if root.is_file():
        root = root.parent
    found = []
    for pattern in patterns:
        start = fixed(pattern)
        rest = str(Path(pattern).relative_to(start))
        hits = [start] if rest == "." else start.glob(rest)
        found += [file for hit in hits for file in ([hit] if hit.is_file() else hit.rglob("*"))]
    files = {file for file in found if file.is_file()}
    if os.environ["HIDDEN"] != "true":
        files = {f for f in files if not any(p.startswith(".") for p in f.relative_to(root).parts)}
    if not files:
        print("no files were found")
        return
    place.mkdir(parents=True)
    for file in sorted(files):
        target = place / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def alternatives(pattern: str) -> list[str]:
    """``{a,b}-*`` as ``a-*`` and ``b-*``."""
    parts = split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(one) for one in product(*choices)]


def download() -> None:
    place = Path(os.environ["PLACE"])
    if os.environ["NAME"]:
        names, merge = [os.environ["NAME"]], True
        if not (KEPT / names[0]).is_dir():
            sys.exit(f"Artifact '{names[0]}' not found")
    else:
        wanted = alternatives(os.environ["PATTERN"])
        every = sorted(folder.name for folder in KEPT.iterdir()) if KEPT.is_dir() else []
        names = [name for name in every if any(fnmatch.fnmatch(name, one) for one in wanted)]
        merge = os.environ["MERGE"] == "true"
    for name in names:
        target = place if merge else place / name
        shutil.copytree(KEPT / name, target, dirs_exist_ok=True)
        print(f"took {name}")


{"upload": upload, "download": download}[sys.argv[1]]()
