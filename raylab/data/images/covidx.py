"""COVIDx label lists: `patientid filename class [source]`, one image per line, separated by spaces.

The source column exists from COVIDx v3 on, and some ids and file names contain spaces, so a line is read from the
right:

1. If the last word but one is a class, the last word is the source. Otherwise, if the last word is a class, the line
   has no source column. Otherwise the class is unknown.
2. What stands before the class is id and file. Two words: one each. More words: the cut where the file without its
   extension equals the id (`COVID (3) COVID (3).png`), else the cut whose file exists in the images folder, else the
   file is the last word and the id has the spaces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from raylab.data.identifiers import MISSING, UNKNOWN, Person, one_identifier, trim
from raylab.data.text import decode
from raylab.errors import DataError

CLASSES = ("normal", "pneumonia", "COVID-19")
BINARY = ("positive", "negative")  # the classes of COVIDx v6 and of the B lists


@dataclass(frozen=True)
class Line:
    patient: str
    file: str  # relative to the images folder
    label: str  # one of the classes
    source: str  # "unknown" if the list has no source column
    number: int  # line in the list, from 1
    view: str = ""  # from a manifest: PA, AP, ...; empty if unknown
    group: str = ""  # from a manifest: rows that must stay together in addition to those of a patient

    @property
    def person(self) -> Person:
        """The person: a patient number identifies one within its source only."""
        return Person.of(self.source, self.patient)


def read_list(path: Path, images: Path, classes: Sequence[str] = CLASSES) -> list[Line]:
    """The lines of one list in their order, without blank lines. `classes`: the words that name a class."""
    try:
        text, _ = decode(path.read_bytes(), str(path))
    except OSError as error:
        why = error.strerror or ""
        raise DataError(f"cannot read the label list {path}", why, "give the path of a COVIDx list") from error
    lines = [
        _line(path, number, words, images, classes)
        for number, row in enumerate(text.splitlines(), 1)
        if (words := row.split())
    ]
    if not lines:
        raise DataError(f"the label list {path} is empty", do="remove it, or give a list with lines")
    return lines


def _line(path: Path, number: int, words: list[str], images: Path, classes: Sequence[str]) -> Line:
    form = "a line is: patientid filename class [source]"
    if len(words) >= 2 and words[-2] in classes:
        *front, label, source = words
    elif words[-1] in classes:
        *front, label = words
        source = UNKNOWN
    elif len(words) < 3:
        raise DataError(f"{path}, line {number}: {len(words)} word(s)", form, "correct the line")
    else:
        found = next((word for word in words[:-3:-1] if word in BINARY), None)
        why = "binary lists (v6, B) do not distinguish the three classes" if found else form
        what = f"class '{found}'" if found else f"no class in '... {' '.join(words[-2:])}'"
        do = f"use a list with the classes {', '.join(classes)}, or name those of this one with --classes"
        raise DataError(f"{path}, line {number}: {what}", why, do)
    if len(front) < 2:
        raise DataError(
            f"{path}, line {number}: no {'file name' if front else 'id and file name'}", form, "correct the line"
        )
    patient, file = _cut(front, images)
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise DataError(
            f"{path}, line {number}: the file {file} is outside of the images folder",
            "file names are relative to --images",
            "correct the line",
        )
    return Line(patient_of(patient, file, f"{path}, line {number}"), file, label, source, number)


def patient_of(text: str, file: str, place: str) -> str:
    """The identifier of a patient; without one the file's name, so that the image is its own patient.

    Raises DataError for an ambiguous number; `place` is its file and line.
    """
    name = one_identifier(text)
    if name is None and trim(text).lower() not in MISSING:
        raise DataError(
            f"{place}: the patient is a number with decimals or an exponent",
            "it is ambiguous which patient is meant",
            "write patients as text or whole numbers",
        )
    return name or file


def _cut(words: list[str], images: Path) -> tuple[str, str]:
    cuts = [(" ".join(words[:at]), " ".join(words[at:])) for at in range(1, len(words))]
    if len(cuts) == 1:
        return cuts[0]
    for patient, file in cuts:
        if PurePosixPath(file).stem == patient:
            return patient, file
    for patient, file in cuts:
        if (images / file).is_file():
            return patient, file
    return cuts[-1]
