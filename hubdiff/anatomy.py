"""Where in a model a tensor belongs, told from its name alone: its stack, its layer, its kind."""

from __future__ import annotations

import re

KINDS = ("attention", "mlp", "norm", "embedding", "other")

# The numbered component of a name is a layer when the word before it says so; "classifier.2" or
# "experts.7" is not one.
_LAYER = re.compile(
    r"(?:^|(?P<stack>.*?)\.)(?:layers?|h|blocks?|resblocks|stages|layer_module)\.(?P<index>\d{1,6})\."
)
# First match wins: q_norm is a norm, attention.output.dense belongs to attention.
_KINDS = (
    ("norm", re.compile(r"norm|(?:^|[._])ln(?:[._\d]|$)", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|(?:^|\.)(?:wte|wpe|shared|lm_head)(?:\.|$)", re.IGNORECASE)),
    (
        "attention",
        re.compile(r"att(?:entio)?n|(?:^|[._])(?:[qkvo]_proj|query|key|value)\.", re.IGNORECASE),
    ),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_?forward|expert|(?:^|[._])(?:gate|up|down)_proj|(?:^|\.)fc\d?|"
            r"densereludense|\.w[io123](?:_\d)?\.|intermediate\.|output\.dense|moe",
            re.IGNORECASE,
        ),
    ),
)


def place(name: str) -> tuple[str, int | None, str]:
    """Stack, layer and kind of a tensor, from its name alone."""
    found = _LAYER.match(name)
    rest = name if found is None else name[found.end() :]
    kind = next((kind for kind, pattern in _KINDS if pattern.search(rest)), "other")
    if found is None:
        return "", None, kind
    return found["stack"] or "", int(found["index"]), kind
