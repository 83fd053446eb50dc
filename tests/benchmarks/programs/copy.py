"""Copy FIRST to OUT while reading the OTHERS too: what an apply moves, with no arithmetic.

python copy.py OUT FSYNC FIRST [OTHERS…]    (FSYNC: 1 or 0)
"""

import os
import sys

out, fsync, *paths = sys.argv[1:]
first, *others = [open(path, "rb", buffering=0) for path in paths]  # noqa: SIM115
piece, spare = bytearray(8 << 20), bytearray(8 << 20)
with open(out, "wb", buffering=0) as file:
    while size := first.readinto(piece):
        file.write(memoryview(piece)[:size])
        for other in others:
            other.readinto(spare)
    for other in others:
        while other.readinto(spare):
            pass
    if fsync == "1":
        os.fsync(file.fileno())
