"""A loopback Hub: enough of the Hugging Face Hub, on a folder, for tests and the demo.

The unmodified official clients (Python and JavaScript) work against it: repos, commits, pull
requests, large files by LFS and by xet, ranges, gated and private repos, collections, trusted
publishers. It keeps a log of every request and breaks connections on demand.

**Never use it in production.** It listens on the loopback address only, its tokens are known in
advance, it trusts its disk, and it forgets nothing. Needs ``pip install "hubdiff[devhub]"`` and git
2.38 or newer.

    from hubdiff.devhub import DevHub

    with DevHub() as hub:
        subprocess.run(["hf", "repo", "create", "demo/x"], env=os.environ | hub.environment())
        print(hub.log.count(kind="commit", repo="demo/x"))

``python -m hubdiff.devhub --folder F --port P`` runs it by itself.
"""

from .log import LogRecord, RequestLog
from .server import DevHub

__all__ = ["DevHub", "LogRecord", "RequestLog"]
