"""Counts of the published experiment's data sets, to report where a folder differs.

Source: the two tables of data sets in the lecture of Barakat and Riedel on COVID-Net. It states 13,975 images of
COVIDx; its classes add up to 13,962.
"""

from collections.abc import Mapping

TABLES: dict[str, dict[str, dict[str, int]]] = {
    "COVIDx": {"all": {"normal": 8066, "pneumonia": 5538, "COVID-19": 358}},
    "E*HealthLine": {
        "train": {"normal": 198, "pneumonia": 21, "COVID-19": 85},
        "test": {"normal": 1700, "pneumonia": 97, "COVID-19": 101},
    },
}
WORDS = {"covidx": "COVIDx", "ehl": "E*HealthLine", "healthline": "E*HealthLine"}  # in the names of label lists


def table_of(list_names: list[str]) -> str | None:
    """The published data set that label lists of these names belong to; None if no name says so."""
    found = {table for name in list_names for word, table in WORDS.items() if word in name.lower()}
    return found.pop() if len(found) == 1 else None


def differences(table: str, counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Descriptions of the differences between `counts` {split: {class: lines in its list}} and the lecture's
    `table`."""
    texts = []
    for part, published in TABLES[table].items():
        for name, expected in published.items():
            here = sum(c.get(name, 0) for s, c in counts.items() if part in ("all", s))
            if here != expected:
                texts.append(
                    f"{'all lists' if part == 'all' else part}: {here:,} {name}, the lecture counts {expected:,}"
                )
    return texts
