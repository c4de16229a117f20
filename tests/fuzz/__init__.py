"""A seeded fuzzer of everything that CalibQuant reads.

A case is a loader and a number. The number draws one to three mutators, which damage a file that the loader accepts.
The loader must then either accept the file, or refuse it by a CalibQuantError of one line that names the file. Another
exception, a hang, a gigabyte of memory or a wrong exit code is a fault.

- `mutators`: damage to bytes and to text, and what may stand in a file's place
- `trees`: damage to JSON and YAML that stays JSON and YAML
- `containers`: damage inside safetensors, tar, PNG, zip, ONNX and pickle whose outer form stays whole
- `loaders`, `image_loaders`, `run_loaders`: the table of loaders
- `running`: one case, its outcome and its limits

`benchmarks/fuzz.py` runs many thousands of cases in processes of their own.
"""

from .image_loaders import IMAGES
from .loaders import RECIPES, Loader
from .run_loaders import RUNS
from .running import Outcome, Site

LOADERS: dict[str, Loader] = {loader.name: loader for loader in (*RECIPES, *IMAGES, *RUNS)}

__all__ = ["LOADERS", "Loader", "Outcome", "Site"]
