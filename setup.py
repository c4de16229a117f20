"""Puts configs/ into the package, so that an installed calibquant brings its recipes; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies configs/ to calibquant/configs of what is built; an editable installation reads the checkout's."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib) / "calibquant" / "configs", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
