"""Other codecs on the 16-bit tensors of a safetensors file, each tensor on its own.

python peer_codecs.py FILE RUNS CODEC…

Prints JSON: codec → tensor → ``bytes``, and with RUNS > 0 CPU seconds of encoding and decoding, the
process's, of every run; a codec that can't run has ``failed`` instead. What comes back is compared
with what went in.
"""

import json
import sys
import time

import numpy as np
from safetensors.numpy import load_file


def zipnn():
    from zipnn import ZipNN

    codec = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
    # It rearranges the bytes it is given, in place: hence a copy of them.
    return lambda a: codec.compress(bytearray(a.tobytes())), lambda blob, a: codec.decompress(blob)


def pcodec():
    from pcodec import ChunkConfig, standalone

    def encode(bits):
        rotated = (bits << 1) | (bits >> 15)  # the sign lowest: like values get like numbers
        blobs = [standalone.simple_compress(a, ChunkConfig()) for a in (rotated, bits.view("i2"))]
        which = min((0, 1), key=lambda i: len(blobs[i]))
        return bytes([which]) + blobs[which]

    def decode(blob, bits):
        found = standalone.simple_decompress(blob[1:]).view(np.uint16)
        return found if blob[0] else (found >> 1) | (found << 15)

    return encode, decode


def zstd(level, planes=False):
    import zstandard

    packer = zstandard.ZstdCompressor(level=level)
    unpacker = zstandard.ZstdDecompressor()

    def encode(bits):
        if not planes:
            return packer.compress(bits)
        return packer.compress(np.ascontiguousarray(bits.view("u1").reshape(-1, 2).T))

    def decode(blob, bits):
        found = np.frombuffer(unpacker.decompress(blob), "u1")
        return np.ascontiguousarray(found.reshape(2, -1).T) if planes else found

    return encode, decode


CODECS = {
    "zipnn": zipnn,
    "pcodec": pcodec,
    "zstd-1": lambda: zstd(1),
    "zstd-19": lambda: zstd(19),
    "planes-zstd-1": lambda: zstd(1, planes=True),
    "planes-zstd-19": lambda: zstd(19, planes=True),
}


def measured(encode, decode, bits, runs):
    row = {"encode": [], "decode": []}
    for _ in range(max(1, runs)):
        times = [time.process_time()]
        blob = encode(bits)
        times.append(time.process_time())
        found = decode(blob, bits)
        times.append(time.process_time())
        row["encode"].append(times[1] - times[0])
        row["decode"].append(times[2] - times[1])
    if np.frombuffer(memoryview(found).cast("B"), "u1").tobytes() != bits.tobytes():
        raise ValueError("what comes back is not what went in")
    return {"bytes": len(blob), **(row if runs else {})}


def main():
    file, runs, *names = sys.argv[1:]
    tensors = {name: a.reshape(-1).view("u2") for name, a in load_file(file).items()}
    result = {}
    for codec in names:
        try:
            encode, decode = CODECS[codec]()
            result[codec] = {
                name: measured(encode, decode, bits, int(runs)) for name, bits in tensors.items()
            }
        except Exception as error:
            result[codec] = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))


main()
