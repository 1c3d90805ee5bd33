"""Pairwise masks: uniform integers that hide a site's values and cancel in the sum of all sites.

Each pair of sites has a secret (X25519). From it, the agreement, the round and the list of sites that take part, both
derive a key (HKDF-SHA-256) and from that a stream of integers (ChaCha20). The first of the two in the list adds the
stream modulo 2^64, the second subtracts it (Bonawitz et al., "Practical secure aggregation for privacy-preserving
machine learning", CCS 2017, section 4, without its shares of secrets: a round that loses a site is repeated with the
others under other masks). No stream serves twice: another round, list or agreement has another key.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from raylab.federation import fixed_point
from raylab.federation.fixed_point import Integers
from raylab.federation.keys import Identity, PrivateKeys
from raylab.federation.rounds import Round


class Masks:
    """The masks of one site towards all others."""

    def __init__(self, keys: PrivateKeys, sites: Sequence[Identity], agreement: str) -> None:
        self.site, self.agreement = keys.site, agreement
        self.secrets: Mapping[str, bytes] = {
            other.site: keys.agree_with(other) for other in sites if other.site != keys.site
        }

    def hide(self, values: Integers, round: Round, sites: Sequence[str]) -> Integers:
        """Return `values` plus this site's masks for `round` among `sites`, the same list on all of them."""
        own = sites.index(self.site)
        for place, other in enumerate(sites):
            if place == own:
                continue
            stream = self._stream(other, round, sites, len(values))
            values = fixed_point.add(values, stream if own < place else np.negative(stream))
        return values

    def _stream(self, other: str, round: Round, sites: Sequence[str], count: int) -> Integers:
        info = f"raylab mask\n{self.agreement}\n{round}\n{' '.join(sites)}".encode()
        key = HKDF(SHA256(), 32, salt=None, info=info).derive(self.secrets[other])
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
        return np.frombuffer(stream, dtype="<i8").astype(np.int64)
