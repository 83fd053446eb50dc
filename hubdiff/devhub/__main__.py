"""``python -m hubdiff.devhub --folder F --port P``: the loopback Hub until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import threading
from pathlib import Path

from .server import DevHub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hubdiff.devhub", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, help="where it keeps everything (default: temporary)"
    )
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument(
        "--user", action="append", metavar="NAME=TOKEN", help="default: demo=hf_demo"
    )
    parser.add_argument("--xet-downloads", action="store_true", help="offer xet to downloads too")
    options = parser.parse_args()
    users = dict(pair.split("=", 1) for pair in options.user) if options.user else None
    with DevHub(
        options.folder, users=users, port=options.port, xet_downloads=options.xet_downloads
    ) as hub:
        print(hub.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
