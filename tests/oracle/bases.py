"""The golden hashes of src/adapters/bases.rs, from the formulas that its documentation writes down
and nothing else: ChaCha8, AS 241, FNV-1a in plain Python.

usage: bases.py        (no packages needed)
"""
import math
import struct

M32 = 0xFFFFFFFF


def chacha8(seed, stream, block):
    key = struct.unpack("<8I", struct.pack("<Q", seed) + bytes(24))
    state = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key,
             block & M32, block >> 32, stream & M32, stream >> 32]
    x = list(state)

    def quarter(a, b, c, d):
        for p, q, s, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[q]) & M32
            v = x[s] ^ x[p]
            x[s] = ((v << n) | (v >> (32 - n))) & M32

    for _ in range(4):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(a + b) & M32 for a, b in zip(x, state)]


def words(seed, stream, start, n):
    block, out = start // 16, []
    while len(out) < n + start % 16:
        out += chacha8(seed, stream, block)
        block += 1
    return out[start % 16:start % 16 + n]


# Wichura (1988), algorithm AS 241, PPND16: numerators and denominators, rising powers.
CENTRE = ([3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125,
           45921.953931549871457, 67265.770927008700853, 33430.575583588128105, 2509.0809287301226727],
          [1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077,
           21213.794301586595867, 39307.895800092710610, 28729.085735721942674, 5226.4952788528545610])
MIDDLE = ([1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
           1.27045825245236838258, 0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4],
          [1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550,
           0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9])
TAIL = ([6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 0.296560571828504891230,
         0.0265321895265761230930, 0.00124266094738807843860, 2.71155556874348757815e-5, 2.01033439929228813265e-7],
        [1.0, 0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525,
         7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15])


def ratio(x, parts):
    def polynomial(c):
        total = 0.0
        for v in reversed(c):
            total = total * x + v
        return total
    return polynomial(parts[0]) / polynomial(parts[1])


def ln(x):
    m, e = math.frexp(x)
    m, e = m * 2, e - 1
    if m > math.sqrt(2):
        m, e = m * 0.5, e + 1
    s = (m - 1.0) / (m + 1.0)
    series = 0.0
    for i in range(12, -1, -1):
        series = series * s * s + 1.0 / (2 * i + 1)
    return e * math.log(2) + 2.0 * s * series


def normal(w):
    p = (w + 0.5) / 4294967296.0
    q = p - 0.5
    if abs(q) <= 0.425:
        return q * ratio(0.180625 - q * q, CENTRE)
    r = math.sqrt(-ln(p if q < 0 else 1.0 - p))
    z = ratio(r - 1.6, MIDDLE) if r <= 5 else ratio(r - 5.0, TAIL)
    return -z if q < 0 else z


def ternary(s):
    share, value = int(4294967296.0 / s), math.sqrt(s / 2)
    return lambda w: value if w < share else -value if w >= 2**32 - share else 0.0


DISTRIBUTIONS = {
    "uniform": lambda w: math.sqrt(3) * ((2.0 * (w >> 8) + 1.0 - 16777216.0) / 16777216.0),
    "normal": normal,
    "signs": ternary(2.0),
    "sparse": ternary(6.0),
    "very sparse, m = 768": ternary(math.sqrt(768)),
}


def single(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def fnv(values):
    h = 0xCBF29CE484222325
    for byte in b"".join(struct.pack("<f", v) for v in values):
        h = ((h ^ byte) * 0x100000001B3) % 2**64
    return h


if __name__ == "__main__":
    seed, rank, small, large = 42, 5, 18, 300
    bases = -(-small // rank)
    for name, entry in DISTRIBUTIONS.items():
        a = [entry(w) for k in range(rank) for w in words(seed, 0, k << 32, small)]
        columns = [[entry(w) for w in words(seed, 1 + i, k << 32, large)] for i in range(bases) for k in range(rank)]
        b = [column[d] for d in range(large) for column in columns]
        print(f"{name}: {fnv(a):#018x} {fnv(b):#018x}")
        if name not in ("uniform", "normal"):
            continue
        # Block bases: row d belongs to basis d // rank mod bases, with the entries of the first.
        own = columns[:rank]
        factor = single(math.sqrt(bases))
        block = [factor * single(own[k][d]) for d in range(large) for k in range(rank)]
        print(f"{name}, block: {fnv(a):#018x} {fnv(block):#018x}")
        # Written out for PEFT in f32, for layers with 3 bases: column q is rank q // 3 of basis q mod 3.
        b = [single(single(math.sqrt(3)) * single(own[q // 3][d])) if q % 3 == d // rank % 3 else 0.0
             for d in range(large) for q in range(3 * rank)]
        print(f"{name}, block, written out: {fnv(b):#018x}")
