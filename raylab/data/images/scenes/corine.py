"""Classes of CORINE land cover as BigEarthNet uses them: 43, and the 19 into which they are grouped (Sumbul et al.
2021, arXiv 2105.07921). Names are without commas and slashes, because scores are named after them."""

from raylab.errors import DataError, unknown

GROUPS: dict[str, tuple[str, ...]] = {
    "Urban fabric": ("Continuous urban fabric", "Discontinuous urban fabric"),
    "Industrial or commercial units": ("Industrial or commercial units",),
    "Arable land": ("Non-irrigated arable land", "Permanently irrigated land", "Rice fields"),
    "Permanent crops": (
        "Vineyards",
        "Fruit trees and berry plantations",
        "Olive groves",
        "Annual crops associated with permanent crops",
    ),
    "Pastures": ("Pastures",),
    "Complex cultivation patterns": ("Complex cultivation patterns",),
    "Land principally occupied by agriculture with significant areas of natural vegetation": (
        "Land principally occupied by agriculture, with significant areas of natural vegetation",
    ),
    "Agro-forestry areas": ("Agro-forestry areas",),
    "Broad-leaved forest": ("Broad-leaved forest",),
    "Coniferous forest": ("Coniferous forest",),
    "Mixed forest": ("Mixed forest",),
    "Natural grassland and sparsely vegetated areas": ("Natural grassland", "Sparsely vegetated areas"),
    "Moors heathland and sclerophyllous vegetation": ("Moors and heathland", "Sclerophyllous vegetation"),
    "Transitional woodland shrub": ("Transitional woodland/shrub",),
    "Beaches dunes sands": ("Beaches, dunes, sands",),
    "Inland wetlands": ("Inland marshes", "Peatbogs"),
    "Coastal wetlands": ("Salt marshes", "Salines"),
    "Inland waters": ("Water courses", "Water bodies"),
    "Marine waters": ("Coastal lagoons", "Estuaries", "Sea and ocean"),
}
UNGROUPED = (
    "Road and rail networks and associated land",
    "Port areas",
    "Airports",
    "Mineral extraction sites",
    "Dump sites",
    "Construction sites",
    "Green urban areas",
    "Sport and leisure facilities",
    "Bare rock",
    "Burnt areas",
    "Intertidal flats",
)
"""Classes of the 43 that the 19 leave out."""
ALL = tuple(sorted({*(name for group in GROUPS.values() for name in group), *UNGROUPED}))


def classes(count: int) -> tuple[str, ...]:
    """The names of 19 or 43 classes."""
    return tuple(GROUPS) if count == 19 else tuple(_plain(name) for name in ALL)


def indices(names: list[str], count: int, place: str) -> tuple[int, ...]:
    """The classes, of 19 or 43, of a patch with these labels of CORINE; none for one whose labels the 19 leave out.
    DataError for a name that CORINE does not have; `place` names the file."""
    if wrong := [name for name in names if name not in ALL]:
        why = (
            "it is one of the 19 groups, and a patch is labelled with the classes in them" if wrong[0] in GROUPS else ""
        )
        do = unknown("label", wrong[0], ALL).do
        raise DataError(f"{place}: the label '{wrong[0]}' is not one of CORINE's 43", why, do)
    if count == 43:
        return tuple(sorted({ALL.index(name) for name in names}))
    return tuple(at for at, group in enumerate(GROUPS.values()) if set(group) & set(names))


def _plain(name: str) -> str:
    return name.replace(",", "").replace("/", " ")
