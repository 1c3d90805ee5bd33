"""Exact samples of the discrete Gaussian distribution, drawn with the randomness of the operating system.

Algorithms 1 to 3 of Canonne, Kamath and Steinke, "The discrete Gaussian for differential privacy" (NeurIPS 2020, arXiv
2004.00010), for many samples at once. They draw and compare integers only: noise from rounded floating-point numbers
has gaps that may show the value beneath it (Mironov, CCS 2012). The source is `secrets`, never a seed, because whoever
knows the noise can subtract it.
"""

import secrets

import numpy as np
from numpy.typing import NDArray

from raylab.federation.fixed_point import Integers

LARGEST_SIGMA = 2**22
"""the squares of samples, within 500 sigma, and 2 sigma^2 times the draws of a row are below 2^64"""

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]


def sample(sigma: int, count: int) -> Integers:
    """Return `count` independent samples x, each with a probability in proportion to exp(-x^2 / (2 sigma^2))."""
    if not 1 <= sigma <= LARGEST_SIGMA:
        raise ValueError(f"sigma {sigma} is not between 1 and {LARGEST_SIGMA}")
    samples = np.empty(count, dtype=np.int64)
    missing = np.arange(count)
    while len(missing):  # Algorithm 3, with t = sigma
        proposed = _sample_laplace(sigma, len(missing))
        distance = np.abs(np.abs(proposed) - sigma).astype(np.uint64)
        accepted = _flip_exp(distance * distance, 2 * sigma * sigma)
        samples[missing[accepted]] = proposed[accepted]
        missing = missing[~accepted]
    return samples


def _sample_laplace(scale: int, count: int) -> Integers:
    """Return samples x, each with a probability in proportion to exp(-|x| / scale): Algorithm 2."""
    samples = np.empty(count, dtype=np.int64)
    missing = np.arange(count)
    while len(missing):
        rest = _draw(scale, len(missing))
        kept = _flip_exp(rest, scale)
        magnitude = rest[kept].astype(np.int64) + scale * _count_heads(int(kept.sum()))
        is_negative = _draw(2, len(magnitude)) == 1
        valid = ~(is_negative & (magnitude == 0))  # zero has one sign
        places = missing[kept]
        samples[places[valid]] = np.where(is_negative, -magnitude, magnitude)[valid]
        is_done = np.zeros(len(missing), dtype=np.bool_)
        is_done[np.flatnonzero(kept)[valid]] = True
        missing = missing[~is_done]
    return samples


def _count_heads(count: int) -> Integers:
    """Return how often each of `count` coins with the probability exp(-1) shows heads before its first tails."""
    heads = np.zeros(count, dtype=np.int64)
    active = np.arange(count)
    while len(active):
        active = active[_flip_small_exp(np.ones(len(active), dtype=np.uint64), 1)]
        heads[active] += 1
    return heads


def _flip_exp(numerators: Words, denominator: int) -> Flags:
    """Return flags that are true with the probability exp(-numerator / denominator) each: Algorithm 1."""
    whole, rest = np.divmod(numerators, np.uint64(denominator))
    flags = np.ones(len(numerators), dtype=np.bool_)
    active = np.flatnonzero(whole > 0)
    flips = 0
    while len(active):
        heads = _flip_small_exp(np.ones(len(active), dtype=np.uint64), 1)
        flags[active[~heads]] = False
        flips += 1
        active = active[heads]
        active = active[whole[active] > flips]
    left = np.flatnonzero(flags)
    flags[left] = _flip_small_exp(rest[left], denominator)
    return flags


def _flip_small_exp(numerators: Words, denominator: int) -> Flags:
    """The same where no numerator exceeds the denominator: the first part of Algorithm 1."""
    flags = np.zeros(len(numerators), dtype=np.bool_)
    active, draws = np.arange(len(numerators)), 0
    while len(active):
        draws += 1
        goes_on = _draw(denominator * draws, len(active)) < numerators[active]
        flags[active[~goes_on]] = draws % 2 == 1
        active = active[goes_on]
    return flags


def _draw(below: int, count: int) -> Words:
    """Return `count` integers that are uniform from 0 to `below` - 1."""
    numbers = _draw_words(count)
    limit = 2**64 - 2**64 % below
    if limit < 2**64:
        while len(beyond := np.flatnonzero(numbers >= np.uint64(limit))):
            numbers[beyond] = _draw_words(len(beyond))
    remainders: Words = numbers % np.uint64(below)
    return remainders


def _draw_words(count: int) -> Words:
    return np.frombuffer(secrets.token_bytes(8 * count), dtype="<u8").astype(np.uint64)
