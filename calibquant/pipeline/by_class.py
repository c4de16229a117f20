"""What an evaluation says of single classes, for those who ask."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibquant.data import ImageSet
from calibquant.errors import DataError
from calibquant.evaluation import Evaluation
from calibquant.evaluation.classes import class_names, class_scores, confusion_csv, most_confused
from calibquant.runfolder import check_file, make_folder, write_alone


@dataclass(frozen=True)
class ByClass:
    """What is asked for beside the scores of all images.

    Args:
        table: the scores of each class.
        confusion: file that receives the confusion matrix as CSV.
    """

    table: bool = False
    confusion: Path | None = None

    def check(self, images: ImageSet) -> None:
        """Before the work: there are labels, and the file can be written.

        Raises:
            DataError: no image has a label.
            RunFolderError: it cannot.
        """
        if (self.table or self.confusion) and not (images.labels() >= 0).any():
            raise DataError("evaluation images", "have no labels", "leave --per-class and --confusion out")
        if self.confusion is not None:
            check_file(self.confusion)

    def of(self, evaluation: Evaluation, images: ImageSet) -> dict[str, Any]:
        """The part of a result that was asked for: `classes`, and `confusion` with its `file` and `most_confused`.

        Raises:
            RunFolderError: the file cannot be written.
        """
        found: dict[str, Any] = {}
        if not self.table and self.confusion is None:
            return found
        counts, names = evaluation.confusion, class_names(images.classes, evaluation.classes)
        if self.table:
            found["classes"] = [asdict(row) for row in class_scores(counts, names)]
        if self.confusion is not None:
            make_folder(self.confusion.parent)
            write_alone(self.confusion, confusion_csv(counts, names).encode())
            pairs = [asdict(pair) for pair in most_confused(counts, names)]
            found["confusion"] = {"file": str(self.confusion), "most_confused": pairs}
        return found


NONE = ByClass()
