"""meta.json of directories prepared from intensive-care data."""

from pydantic import Field

from raylab.data.prepared import Meta

Number = int | float
Counts = dict[str, dict[str, int]]


class IcuMeta(Meta):
    """The meta.json of intensive-care data. Counts by concept count values; `stays` and `coverage` count all stays, the
    other fields rows at risk."""

    label: dict[str, bool | int | float | str | None]
    """the definition of the label, from `Label.describe`"""
    framing: str
    landmark_h: Number
    horizon_h: Number | None
    """none if the outcome may occur at any time"""
    gap_h: Number
    until_h: Number | None = None
    """rolling prediction: the last hour with a prediction"""
    notes: list[str]
    features: list[str]
    static: list[str]
    virtual_patient: list[str] = Field([])
    """features of the lung model"""
    unmeasured: list[str] = Field([])
    statistics: dict[str, dict[str, Number | None]]
    """feature -> mean and std of train, and n, the number of values"""
    cohorts: Counts
    cohort_attrition: dict[str, list[dict[str, int | str]]] = Field({})
    ends: dict[str, int]
    """how the rows end"""
    classes: list[str] = Field(["no onset", "onset"])
    onsets: dict[str, int] | None = None
    sensitivity: list[dict[str, Number]] = Field([])
    """onsets by the windows for FiO2 and persistence"""
    outcomes: dict[str, int] = Field({})
    out_of_range: dict[str, int] = Field({})
    unreadable: dict[str, int] = Field({})
    percent: dict[str, int] = Field({})
    room_air: dict[str, int] = Field({})
    no_unit: dict[str, int] = Field({})
    converted: Counts = Field({})
    """concept -> unit as recorded -> values"""
    unknown_units: Counts = Field({})
    left_out: list[str] = Field([])
    coverage: dict[str, int]
    stays: int
    dropped: dict[str, int] = Field({})
    split: dict[str, str | int] | None = None
    """what is held out, if the data was split again"""
    patients_in_two_hospitals: int | None = None
