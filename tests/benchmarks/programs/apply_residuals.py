"""residuals: a DELTA onto TARGET in OUT. python apply_residuals.py DELTA TARGET OUT"""

import sys

from residuals import Residuals

delta, target, out = sys.argv[1:]
Residuals.apply_to_pretrained(target, delta, out_dir=out)
