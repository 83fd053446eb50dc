"""Llama-shaped bf16 models of any size, with drawn weights: what matters to speed and traffic is
the shapes, and how a difference is distributed.

base is N(0, 0.02), tuned = base + N(0, 6.5e-5), which leaves 45 % of the elements as they were,
like an SFT at a learning rate of 2e-5; target = base + N(0, 2e-3), like the base's next release.
2^23 elements are drawn and repeated, each time shifted, until a model is full: far enough apart for
an encoder that looks back 128 KiB. Seeds are fixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from hubdiff.safetensors_io import build_header

POOL = 1 << 23
KINDS = ("base", "tuned", "target")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """The sizes that tensor shapes follow from."""

    hidden: int
    inner: int
    keys: int  # width of the keys and values
    rows: int  # of the vocabulary

    def layer(self, i: int) -> Shapes:
        square, narrow = (self.hidden, self.hidden), (self.keys, self.hidden)
        shapes: Shapes = {
            "input_layernorm": (self.hidden,),
            "mlp.down_proj": (self.hidden, self.inner),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "self_attn.k_proj": narrow,
            "self_attn.o_proj": square,
            "self_attn.q_proj": square,
            "self_attn.v_proj": narrow,
        }
        return {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}

    def shards(self, layers: int) -> list[Shapes]:
        """The input embedding, each layer, the norm with the head."""
        table = (self.rows, self.hidden)
        first: Shapes = {"model.embed_tokens.weight": table}
        last: Shapes = {"model.norm.weight": (self.hidden,), "lm_head.weight": table}
        return [first, *(self.layer(i) for i in range(layers)), last]

    def layers_for(self, nbytes: float) -> int:
        rest = nbytes / 2 - 2 * self.rows * self.hidden
        return max(1, round(rest / sum(map(math.prod, self.layer(0).values()))))

    def config(self, layers: int) -> dict[str, object]:
        head = 128
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.hidden // head,
            "num_key_value_heads": self.keys // head,
            "num_hidden_layers": layers,
            "vocab_size": self.rows,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


TINY_LLAMA = Llama(2048, 5632, 2048, 32_000)
LLAMA_3_8B = Llama(4096, 14336, 1024, 128_256)


def bf16(values: np.ndarray) -> np.ndarray:
    """The bits of ``values`` (float32), rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@cache
def pools() -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(0)
    base = bf16(rng.standard_normal(POOL, dtype=np.float32) * 0.02)
    start = (base.astype(np.uint32) << 16).view(np.float32)
    return {
        "base": base,
        "tuned": bf16(start + rng.standard_normal(POOL, dtype=np.float32) * 6.5e-5),
        "target": bf16(start + rng.standard_normal(POOL, dtype=np.float32) * 2e-3),
    }


def write_model(
    folder: Path, kind: str, model: Llama, layers: int, *, sharded: bool = False
) -> int:
    """A model folder of one kind, with a tokenizer of as many tokens; the size of its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config(layers), indent=2))
    shards: Sequence[Shapes] = model.shards(layers)
    if not sharded:
        shards = [{name: shape for shard in shards for name, shape in shard.items()}]
    weight_map: dict[str, str] = {}
    size = position = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if sharded else "model.safetensors"
        position = _write_shard(folder / file, kind, shard, position)
        weight_map |= dict.fromkeys(shard, file)
        size += (folder / file).stat().st_size
    if sharded:
        index = {"metadata": {"total_size": position}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _write_tokenizer(folder, model.rows)
    return size


def _write_shard(path: Path, kind: str, shapes: Shapes, position: int) -> int:
    """The bytes from ``position`` of the endless repetition of the pool; where they end."""
    sized = [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()]
    end = position + sum(nbytes for *_, nbytes in sized)
    with path.open("wb") as file:
        file.write(build_header(sized, {"format": "pt"}))
        while position < end:
            turn, at = divmod(position, 2 * POOL)
            piece = np.roll(pools()[kind], 977 * turn).tobytes()[at : at + end - position]
            position += file.write(piece)
    return end


def _write_tokenizer(folder: Path, rows: int) -> None:
    """Peers that load a model whole want one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(rows)}, unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
