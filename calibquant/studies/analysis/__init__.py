"""Analysis: what quantization does to each tensor of a network, and what would help.

    found = analyze(load_recipe("recipe.yaml"))
    print(found.advice[0].text)

- `tensors`: ranges, clipping, error, density and outlier channels of single tensors
- `ranges`: clipping ranges by several observers
- `advice`: what the facts suggest, in plain words
- `running`: the whole analysis; `page`, `figures`: what it leaves
"""

from calibquant.studies.analysis.running import PAGE, RESULT, Analysis, analyze

__all__ = ["PAGE", "RESULT", "Analysis", "analyze"]
