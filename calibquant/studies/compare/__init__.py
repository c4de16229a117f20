"""Comparing methods: each at several settings and with several seeds, as mean ± sd with paired tests.

    comparison = compare("recipe.yaml", ["nearest", "qdrop"], ["w4a4", "w2a2"], seeds=3)
    comparison.result["table"]

- `planning`: the study as a list of cells, and what makes a study impossible
- `cells`, `predictions`: one cell: taken from disk, gone on with, or run; what it said of each image
- `running`: the whole study
- `processes`: several cells at a time
- `summary`, `markdown`: what the cells say, as JSON and as a page
"""

from calibquant.studies.compare.planning import STUDIES, chosen_study
from calibquant.studies.compare.running import PAGE, RESULT, Comparison, compare

__all__ = ["PAGE", "RESULT", "STUDIES", "Comparison", "chosen_study", "compare"]
