"""A study of which calibration images serve best: strategies × sizes × draws × seeds, paired."""

from calibquant.studies.selection.planning import SHIFTS, SelectionStudy, make_selection_study
from calibquant.studies.selection.running import PAGE, RESULT, SelectionResult, study_selection

__all__ = [
    "PAGE", "RESULT", "SHIFTS", "SelectionResult", "SelectionStudy", "make_selection_study", "study_selection",
]  # fmt: skip
