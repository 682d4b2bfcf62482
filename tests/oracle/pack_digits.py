"""Packs the handwritten digits into src/data/digits.bin.

    python3 tests/oracle/pack_digits.py digits.csv.gz src/data/digits.bin

The input is scikit-learn's copy: a line an image, 64 numbers 0 to 16 and the label. The output:

    8 bytes      "digits8\\n"
    4 bytes      n, the number of images, little-endian
    (n+1)/2      the labels, two to a byte, the first in the low half
    8 an image   64 bits, bit i (of the little-endian number) set where pixel i is not 0
    the rest     those pixels less 1, two to a byte, the first in the low half
"""

import gzip
import struct
import sys


def nibbles(values):
    values = list(values) + [0] * (len(values) % 2)
    return bytes(low | high << 4 for low, high in zip(values[::2], values[1::2]))


def main(source, target):
    with gzip.open(source, "rt") as lines:
        rows = [[int(float(x)) for x in line.split(",")] for line in lines]
    assert all(len(row) == 65 and all(0 <= x <= 16 for x in row) for row in rows)
    images, labels = [row[:64] for row in rows], [row[64] for row in rows]
    maps = [sum(1 << i for i, x in enumerate(image) if x) for image in images]
    inked = [x - 1 for image in images for x in image if x]
    with open(target, "wb") as out:
        out.write(b"digits8\n" + struct.pack("<I", len(rows)) + nibbles(labels))
        out.write(b"".join(struct.pack("<Q", m) for m in maps) + nibbles(inked))


main(*sys.argv[1:])
