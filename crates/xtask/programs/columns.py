"""Sort and matrix work in numpy on arrays several times a tight budget; prints digests.

All numbers are small integers or their eighths, so that sums and products are exact whatever order a BLAS takes,
and the digests are the same in every run.
"""

import hashlib
import sys

import numpy as np


def say(name, array):
    print(name, array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(), flush=True)


def main(rows, side):
    rng = np.random.default_rng(42)
    clock = 1_700_000_000_000 + np.cumsum(rng.integers(1, 2000, rows))
    price = rng.integers(20, 4000, rows) / 8.0
    count = rng.integers(0, 200, rows)
    say("clock", clock)
    order = np.argsort(price, kind="stable")
    say("order", order)
    say("by price", clock[order])
    del order
    shuffled = rng.permutation(clock)
    shuffled.sort()
    print("sorted", bool((shuffled == clock).all()), flush=True)
    del shuffled
    print("turnover", float((price * count).sum()), flush=True)
    say("per hour", np.bincount((clock - clock[0]) // 3_600_000, weights=price))
    probes = rng.integers(0, rows, rows // 8)
    say("probes", price[probes] + count[probes])
    del clock, price, count, probes

    left = rng.integers(-8, 9, (side, side)).astype(np.float64)
    right = rng.integers(-8, 9, (side, side)) / 8.0
    product = left @ right
    say("product", product)
    say("transposed", product.T + left)
    product += right
    print("trace", float(np.trace(product)), flush=True)


main(int(sys.argv[1]), int(sys.argv[2]))
