"""New bases found, deltas brought to them, judged and published: what ``hubdiff watch``, ``hubdiff
backport`` and the GitHub workflow do.

``watch`` compares ``hubdiff.yaml`` with ``hubdiff.lock`` and the Hub, and plans items: one delta on
one base each. ``run`` makes and measures an item, ``gate`` decides, ``publish`` puts it on the Hub,
``record`` writes the lock, ``report`` tells people. Every stage reads what the one before wrote as
JSON, so that each may run in a job of its own that has no more rights than it needs.
"""
