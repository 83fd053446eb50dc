"""Is the installed hubdiff whole? Run by `make wheel` with the Python of a fresh environment.

    python tests/installed.py ENVIRONMENT

It must be imported from ENVIRONMENT, not from a source tree, and find every template there.
"""

import sys
from importlib.resources import files
from pathlib import Path

import hubdiff
from hubdiff.card import template

environment = Path(sys.argv[1]).resolve()
package = Path(hubdiff.__file__).resolve().parent
if environment not in package.parents:
    sys.exit(f"hubdiff comes from {package}, not from {environment}")
templates = Path(__file__).parents[1] / "templates"
files_there = (file for file in templates.rglob("*") if file.is_file())
expected = sorted(file.relative_to(templates).as_posix() for file in files_there)
for name in expected:
    if template(name) != (package / "templates" / name).read_text(encoding="utf-8"):
        sys.exit(f"{name} is not the wheel's own")
if not files("hubdiff").joinpath("py.typed").is_file():
    sys.exit("py.typed is missing")
print(f"hubdiff {hubdiff.__version__} from the wheel, with {', '.join(expected)}")
