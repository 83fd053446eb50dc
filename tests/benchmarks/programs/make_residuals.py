"""residuals: BASE and TUNED to a delta in OUT. python make_residuals.py BASE TUNED OUT"""

import sys

from residuals import Residuals

base, tuned, out = sys.argv[1:]
Residuals.from_models(base, tuned, instruct_tokenizer_name=tuned).save_pretrained(out)
