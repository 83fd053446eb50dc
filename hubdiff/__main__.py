"""``python -m hubdiff`` is the ``hubdiff`` command."""

from hubdiff.cli import main

if __name__ == "__main__":
    main()
