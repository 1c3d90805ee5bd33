"""Drawn chest X-rays: SYNTHETIC phantoms, for tests, demonstrations and machines without data.

A thorax of ellipses (body, lungs, heart, diaphragm, spine) with ribs and noise. Pneumonia is one focus in one lung;
COVID-19 is several faint foci in the periphery of both; healthy lungs may show a vague shadow, and faint disease is
hard to see, so that a network learns but is not perfect. Nothing here is a model of disease.

Two sites draw the same anatomy with other machines: domain "A" (linear film, thin dark border) and domain "B"
(brighter gamma, wide collimation on two sides, a marker in the corner, more noise).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.errors import unknown

DOMAINS = ("A", "B")
PREVALENCE = {"A": (0.45, 0.35, 0.20), "B": (0.35, 0.40, 0.25)}  # normal, pneumonia, COVID-19
CHUNK = 64  # images drawn at a time, which bounds the memory to about 20 layers of 64 images

F32 = NDArray[np.float32]


def draw(patients: int, size: int, seed: int, domain: str = "A") -> tuple[NDArray[np.uint8], list[int], list[int]]:
    """Images uint8 [N, size, size], label (0 normal, 1 pneumonia, 2 COVID-19) and patient number of each.

    A patient has one class, one body and 1 to 3 images of it.
    """
    if domain not in DOMAINS:
        raise unknown("domain of phantoms", domain, DOMAINS)
    rng = np.random.default_rng([seed, DOMAINS.index(domain)])
    # At least one patient of every class.
    label_P = np.concatenate([np.arange(3), rng.choice(3, size=max(0, patients - 3), p=PREVALENCE[domain])])[:patients]
    body_PK = rng.standard_normal((patients, 6)).astype(np.float32)
    patient_N = np.repeat(np.arange(patients), rng.integers(1, 4, size=patients))
    images = [
        _images(rng, label_P[part], body_PK[part], size, domain)
        for part in (patient_N[at : at + CHUNK] for at in range(0, len(patient_N), CHUNK))
    ]
    return np.concatenate(images), label_P[patient_N].tolist(), patient_N.tolist()


def _images(rng: np.random.Generator, label: NDArray[Any], body: F32, size: int, domain: str) -> NDArray[np.uint8]:
    """uint8 [B, size, size] of the bodies `body` [B, 6] (standard normal) with the diseases `label` [B]."""
    count = len(label)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    y, x = axis[None, :, None], axis[None, None, :]  # [1, S, 1], [1, 1, S]; y grows downwards

    def uniform(low: float, high: float) -> F32:
        return rng.uniform(low, high, size=(count, 1, 1)).astype(np.float32)

    def blob(cy: Any, cx: Any, ry: Any, rx: Any, soft: float) -> F32:
        """1 inside an ellipse, 0 outside, with a soft rim [B, S, S]."""
        r = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
        inside: F32 = np.clip((1 - r) / soft + 0.5, 0, 1)
        return inside

    shape = body[:, :, None, None] * 0.03  # a patient's own proportions, [B, 6, 1, 1]
    dy, dx = uniform(-0.06, 0.06), uniform(-0.06, 0.06)  # position at this exposure
    high, wide = 0.62 + shape[:, 0], 0.30 + shape[:, 1] * 0.6
    middle = 0.40 + shape[:, 2] * 0.5

    torso = blob(0.25 + dy, dx, 1.35, 0.95 + shape[:, 3], 0.25)
    sides = [dx - middle, dx + middle]
    lungs = [blob(-0.10 + dy, cx, high, wide, 0.25) for cx in sides]
    lung = np.maximum(*lungs)
    heart = blob(0.22 + dy, dx + 0.14, 0.30 + shape[:, 4], 0.30 + shape[:, 5], 0.5)
    spine = np.exp(-(((x - dx) / 0.09) ** 2))
    ribs = 0.5 + 0.5 * np.sin((y + 0.35 * (x - dx) ** 2 + dy) * (24 + 20 * shape[:, 0]))

    film = 0.62 * torso - 0.40 * lung + 0.25 * heart * torso + 0.12 * spine * torso + 0.05 * ribs * lung

    sick, covid = (label > 0)[:, None, None], (label == 2)[:, None, None]
    strength = uniform(0.08, 0.32)
    one_side = rng.integers(0, 2, size=(count, 1, 1)).astype(bool)
    focus_y, focus_x = uniform(-0.35, 0.35), uniform(-0.3, 0.3)
    opacity = np.zeros_like(film)
    for side, (inside, cx) in enumerate(zip(lungs, sides, strict=True)):
        focal = blob(focus_y + dy, cx + focus_x * wide, uniform(0.16, 0.32), uniform(0.12, 0.22), 1.2)
        opacity += inside * focal * (sick & ~covid & (one_side == bool(side))) * strength
        outwards = -1 if side == 0 else 1
        for _ in range(3):
            at_y, at_x = uniform(-0.45, 0.40), cx + outwards * wide * uniform(0.45, 0.85)
            patch = blob(at_y + dy, at_x, uniform(0.10, 0.24), uniform(0.07, 0.15), 1.2)
            opacity += inside * patch * covid * strength * 0.8
        # A faint meaningless shadow is in every lung, sick or not.
        opacity += inside * blob(uniform(-0.5, 0.5) + dy, cx, 0.25, 0.18, 1.5) * uniform(0.0, 0.07)
    film = film + opacity

    exposure = uniform(0.9, 1.1)
    noise = rng.standard_normal(film.shape, dtype=np.float32)
    if domain == "A":
        film = np.clip(film * exposure + 0.03 * noise + 0.05, 0, 1)
        film *= blob(0, 0, 1.0, 1e3, 0.05) * blob(0, 0, 1e3, 1.0, 0.05)
    else:
        film = np.clip(film * exposure + 0.04 * noise + 0.05, 0, 1) ** 0.7
        film *= blob(0, 0, 1e3, uniform(0.82, 0.95), 0.03)
        film = np.maximum(film, 0.95 * ((np.abs(y + 0.85) < 0.05) & (np.abs(x + 0.72) < 0.03)))
    pixels: NDArray[np.uint8] = np.rint(film * 255).astype(np.uint8)
    return pixels
