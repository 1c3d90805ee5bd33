"""Parsing and conversion of units as hospitals write them: UCUM or common spellings, in any letter case.

`parse` reads a spelling; `conversion` returns how to convert values from one unit to another. A unit that cannot be
parsed, or that measures something else, has no conversion: nothing is guessed.
"""

import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import product

Parsed = tuple[float, tuple[tuple[str, int], ...]]
"""A factor and powers of units: `10*3/uL` is (1000.0, (("microliter", -1),))."""

NO_UNIT = {"", "unk", "unknown", "none", "null", "nan", "na", "n/a", "-", "--", ".", "?", "no unit", "unitless"}
"""Entries, in lower case, that stand for a missing unit."""

_POWERS = {"hecto": 1e2, "kilo": 1e3, "deci": 1e-1, "centi": 1e-2, "milli": 1e-3, "micro": 1e-6, "nano": 1e-9,
           "pico": 1e-12, "femto": 1e-15}  # fmt: skip
_PREFIXES = {
    "": "",
    **{name: name for name in _POWERS},
    **{"h": "hecto", "k": "kilo", "d": "deci", "c": "centi", "m": "milli", "u": "micro", "mc": "micro"},
    **{"n": "nano", "p": "pico", "f": "femto"},
}
_METRIC = {
    "gram": "g gm gms gram grams",
    "liter": "l liter liters litre litres",
    "mole": "mol mols mole moles",
    "meter": "m meter meters metre metres",
    "pascal": "pa pascal pascals",
    "bar": "bar bars",
    "equivalent": "eq equiv equivalent equivalents",
    "enzyme_unit": "u iu [iu] unit units",
    "katal": "kat katal",
}
_OTHER = {
    "mmHg": "mmhg mm[hg] torr",
    "cmH2O": "cmh2o cm[h2o] cmh20 cmofwater cmwater",
    "psi": "psi [psi]",
    "kilogram": "kgs kilo kilos",
    "pound": "lb lbs pound pounds [lb_av]",
    "ounce": "oz ounce ounces [oz_av]",
    "stone": "stone stones [stone_av]",
    "inch": 'in inch inches [in_i] [in_us] "',
    "foot": "ft foot feet [ft_i] [ft_us]",
    "degC": "c cel celsius centigrade degc °c",
    "degF": "f fahrenheit degf [degf] °f",
    "kelvin": "k kelvin",
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "d day days",
    "week": "wk week weeks",
    "month": "mo month months",
    "year": "a y yr yrs year years",
    "percent": "% pct percent vol% %vol",
    "": "1 fraction ratio point points score ph [ph] cell cells count counts # beat beats breath breaths insp resp",
}
_ATOMS = {
    prefix + spelling: f"{long}{name}"
    for name, spellings in _METRIC.items()
    for spelling in spellings.split()
    for prefix, long in _PREFIXES.items()
} | {spelling: name for name, spellings in _OTHER.items() for spelling in spellings.split()}
_SHORT = {"cc": "ml", "bpm": "1/min", "lpm": "l/min", "cumm": "mm3", "cmm": "mm3"}
_THOUSANDS = {"k": "1e3", "th": "1e3", "thou": "1e3", "thousand": "1e3", "thousands": "1e3", "tsd": "1e3",
              "million": "1e6", "millions": "1e6", "mio": "1e6", "billion": "1e9", "billions": "1e9"}  # fmt: skip
_REWRITES = [
    (re.compile(r"\{[^{}]*\}"), ""),  # UCUM's annotations: {beats}/min
    (re.compile(r"^(?:deg(?:rees?|s)?\.?|[?�])\s?(?=[cf]|celsius|fahrenheit)"), "deg"),
    (re.compile(r"^deg(?=celsius|fahrenheit)"), ""),
    (re.compile(r"\s?\bper\b\s?"), "/"),
    (re.compile(r"\s*([/*^])\s*"), r"\1"),
    (re.compile(r"\.$"), ""),
    (re.compile(r"\bx\s?(?=\d)"), ""),
    (re.compile(r"\b10\s?(?:\*\*|[*^e])\s?\+?(-?\d+)"), r"1e\1"),
    (re.compile(r"\b10\((-?\d+)\)"), r"1e\1"),
    (re.compile(r"^([a-z]*g)\s?(?:%|percent)$"), r"\1/dl"),  # mg% is mg/dL
]
_FACTOR = re.compile(r"(?P<number>\d+(?:e-?\d+)?)?(?P<atom>[a-z%°#\"\[\]_]\S*?)?(?:\^?(?P<power>-?\d))?")


def spelled(unit: str) -> str:
    """Return the normalised spelling: lower case, single spaces, `u` for either micro sign, 10^9 for 10⁹."""
    text = unit.replace("Â", "").translate({ord("º"): "°", ord("×"): "x", ord("·"): "*", ord("⋅"): "*"})
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^" + found[0], text)
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("μ", "u")
    return " ".join(text.lower().split())


@cache
def parse(unit: str) -> Parsed | None:
    """Parse the spelling of a unit; None if it is not understood."""
    if molar := re.fullmatch(r"([munpµμ]?)M", unit.strip()):
        return parse(f"{molar[1]}mol/L")
    text = spelled(unit)
    for pattern, instead in _REWRITES:
        text = pattern.sub(instead, text)
    head, slash, rest = text.partition("/")
    if slash and head.removesuffix("cells").strip() in _THOUSANDS:
        text = f"{_THOUSANDS[head.removesuffix('cells').strip()]}/{rest}"
    text = text.strip()
    if not text:
        return 1.0, ()
    # "mm hg" is one word, "mmol l-1" are two
    return _parse_factors(text.replace(" ", "")) or _parse_factors(text.replace(" ", "*"))


def _parse_factors(text: str) -> Parsed | None:
    """Parse `1e3/ul`, `mg/dl`, `mmol*l-1`: factors from left to right; only the first may be missing, as in `/min`."""
    number, powers, sign = 1.0, Counter[str](), 1
    first, *rest = re.split(r"([/*.])", text)
    for operator, part in zip(["*", *rest[::2]], [first or "1", *rest[1::2]], strict=True):
        sign = -1 if operator == "/" else 1
        factor = _parse_factors(_SHORT[part]) if part in _SHORT else _parse_factor(part)
        if factor is None:
            return None
        number *= factor[0] ** sign
        powers.update({name: sign * power for name, power in factor[1]})
    return number, tuple(sorted((name, power) for name, power in powers.items() if power))


def _parse_factor(part: str) -> Parsed | None:
    """Parse a single factor: `mmhg`, `mm3`, `l-1`, `1e3`, `100ml`."""
    if part in _ATOMS:
        return 1.0, ((_ATOMS[part], 1),) if _ATOMS[part] else ()
    found = _FACTOR.fullmatch(part)
    if not part or found is None or (found["atom"] or "1") not in _ATOMS:
        return None
    name = _ATOMS[found["atom"] or "1"]
    return float(found["number"] or 1), ((name, int(found["power"] or 1)),) if name else ()


_METRE, _KILOGRAM, _SECOND, _KELVIN = ("m", 1), ("kg", 1), ("s", 1), ("K", 1)
_PRESSURE = (("kg", 1), ("m", -1), ("s", -2))
_SIZES: dict[str, tuple[float, tuple[tuple[str, int], ...]]] = {  # size of each unit in SI base units
    "gram": (1e-3, (_KILOGRAM,)),
    "liter": (1e-3, (("m", 3),)),
    "mole": (1.0, (("mol", 1),)),
    "meter": (1.0, (_METRE,)),
    "pascal": (1.0, _PRESSURE),
    "bar": (1e5, _PRESSURE),
    "equivalent": (1.0, (("eq", 1),)),
    "enzyme_unit": (1e-6 / 60, (("mol", 1), ("s", -1))),
    "katal": (1.0, (("mol", 1), ("s", -1))),
    "mmHg": (133.322387415, _PRESSURE),
    "cmH2O": (98.0665, _PRESSURE),
    "psi": (0.45359237 * 9.80665 / 0.0254**2, _PRESSURE),
    "pound": (0.45359237, (_KILOGRAM,)),
    "ounce": (0.45359237 / 16, (_KILOGRAM,)),
    "stone": (0.45359237 * 14, (_KILOGRAM,)),
    "inch": (0.0254, (_METRE,)),
    "foot": (0.3048, (_METRE,)),
    "kelvin": (1.0, (_KELVIN,)),
    "degC": (1.0, (_KELVIN,)),
    "degF": (5 / 9, (_KELVIN,)),
    "second": (1.0, (_SECOND,)),
    "minute": (60.0, (_SECOND,)),
    "hour": (3600.0, (_SECOND,)),
    "day": (86400.0, (_SECOND,)),
    "week": (7 * 86400.0, (_SECOND,)),
    "month": (365.25 / 12 * 86400, (_SECOND,)),
    "year": (365.25 * 86400, (_SECOND,)),
    "percent": (0.01, ()),
}
_ZEROS = {"degC": 273.15, "degF": 459.67 * 5 / 9}  # zero of the scale in kelvin


def _measure(of: Parsed) -> tuple[float, Counter[str]]:
    """Return (size of one unit in SI base units, powers of those base units)."""
    size, dimension = of[0], Counter[str]()
    for name, power in of[1]:
        prefix = "" if name in _SIZES else next(p for p in _POWERS if name.startswith(p))
        one, powers = _SIZES[name.removeprefix(prefix)]
        size *= (_POWERS.get(prefix, 1.0) * one) ** power
        dimension.update({base: power * n for base, n in powers})
    return size, dimension


def _zero(of: Parsed) -> float:
    """Return the zero of a temperature scale in kelvin; 0 for any other unit."""
    return _ZEROS.get(of[1][0][0], 0.0) if of[1] else 0.0


@cache
def conversion(
    said: str, own: str, molar_mass: float | None = None, charge: int | None = None
) -> tuple[float, float] | None:
    """Return (scale, offset) such that value * scale + offset converts from `said` to `own`; None if impossible.

    `molar_mass` (g/mol) relates masses to amounts of substance, `charge` relates amounts to equivalents.
    """
    source, target = parse(said), parse(own)
    if source is None or target is None:
        return None
    if source == target:
        return 1.0, 0.0
    (size, dimension), (own_size, own_dimension) = _measure(source), _measure(target)
    if dimension == own_dimension:
        return _exact(size / own_size), (_zero(source) - _zero(target)) / own_size
    bridges = [(molar_mass and molar_mass / 1000, "kg"), (charge, "eq")]  # per mole
    for powers in product((-1, 0, 1), repeat=len(bridges)):
        bridged, bridged_dimension = size, Counter(dimension)
        for (per_mole, base), power in zip(bridges, powers, strict=True):
            if per_mole is None:
                continue
            bridged *= per_mole**power
            bridged_dimension.update({base: power, "mol": -power})
        if bridged_dimension == own_dimension:
            return _exact(bridged / own_size), 0.0
    return None


def _exact(scale: float) -> float:
    """Return the scale without its last digits, which have rounding errors, so that ng/mL to ug/L is exactly 1."""
    return float(f"{scale:.14g}")
