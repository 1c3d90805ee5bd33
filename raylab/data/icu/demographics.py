"""Parsing of age and sex in their usual notations: numbers, words, `> 89`, MIMIC-III's 300 years.

Values that cannot be read are null, and the caller counts them. docs/data.md lists the notations.
"""

import polars as pl

from raylab.data.identifiers import is_missing, trimmed

OLDEST_AGE = 91.4
"""Years: the median age of MIMIC-III's patients older than 89, as its documentation gives it [M]."""
HIDDEN_FROM = 89.0  # years; the Safe Harbor rule hides ages from here on
SHIFTED = (295.0, 330.0)  # MIMIC-III shifts the birth of patients older than 89 by 300 years

SEX = {
    **dict.fromkeys(("m", "male", "man", "1"), 1.0),
    **dict.fromkeys(("f", "female", "woman", "0"), 0.0),
    "8507": 1.0,  # OMOP
    "8532": 0.0,
}
_YEARS = r"(?:y|yr|yrs|year|years)"
_DAYS_IN = {r"(?:m|mo|month|months)": 365.25 / 12, r"(?:w|wk|week|weeks)": 7.0, r"(?:d|day|days)": 1.0}


def age(name: str, kind: pl.DataType) -> pl.Expr:
    """Return the column `name` as an age in years; null if it cannot be read.

    A lower bound of 89 or more (`> 89`, `89+`, `90 or older`) and an age of about 300 become OLDEST_AGE, any other
    lower bound becomes that bound (`85+`: 85), and an upper bound becomes the year below it (`< 18`: 17).
    """
    if kind.is_numeric():
        years = pl.col(name).cast(pl.Float64).fill_nan(None)
    else:
        text = trimmed(pl.col(name)).str.to_lowercase().str.replace(",", ".", literal=True)

        def number(pattern: str) -> pl.Expr:
            return text.str.extract(pattern, 1).cast(pl.Float64, strict=False)

        plain = number(rf"^(-?\d+(?:\.\d+)?)\s*{_YEARS}?(?:\s*old)?$")
        young = pl.coalesce(
            number(rf"^(\d+(?:\.\d+)?)\s*{unit}(?:\s*old)?$") * days / 365.25 for unit, days in _DAYS_IN.items()
        )
        above = pl.coalesce(
            number(rf"^(?:>=?|≥|over|above|older than|at least)\s*(\d+(?:\.\d+)?)\s*{_YEARS}?$"),
            number(rf"^(\d+(?:\.\d+)?)\s*{_YEARS}?\s*(?:\+|(?:or|and)\s*(?:older|over|above|more))$"),
        )
        below = number(rf"^(?:<=?|≤|under|below|younger than)\s*(\d+(?:\.\d+)?)\s*{_YEARS}?$")
        years = pl.coalesce(
            plain,
            young,
            pl.when(above >= HIDDEN_FROM).then(OLDEST_AGE).otherwise(above),
            (below - 1).clip(0),
        )
    return pl.when(years.is_between(*SHIFTED)).then(OLDEST_AGE).otherwise(years).alias(name)


def sex(name: str) -> pl.Expr:
    """Return the column `name` as 1.0 (male) or 0.0 (female); null for anything else."""
    text = trimmed(pl.col(name)).str.to_lowercase().str.replace(r"^([01])\.0*$", "${1}")
    return text.replace_strict(SEX, default=None, return_dtype=pl.Float64).alias(name)


def count_unread(table: pl.DataFrame, column: str, read: str) -> int:
    """Count the rows in which `column` has a value but `read`, its parsed form, is null."""
    said = ~is_missing(column, table.schema[column])
    return int(table.select((said & pl.col(read).is_null()).sum()).item())
