"""The tags by which the Hub finds deltas and their kin."""

from __future__ import annotations

DELTA_TAG = "diff-vector"
BASE_MODEL = "base_model"  # the Hub's own: base_model:ORG/NAME, from a card's base_model
START = "started_from"  # started_from:ORG/NAME, the delta that training began with, likewise
TUNED_MODEL = "tuned_model"  # tuned_model:ORG/NAME, which a delta's card carries itself
