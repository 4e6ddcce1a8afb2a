"""Adds the DeepSpeed profiles to what is installed; all else is in pyproject.toml.

`ds_configs/` stands at the top of the checkout, where people look for it, and not in a package. A
build copies it into `pretrain/ds_configs`, where the installed program looks; a checkout (also one
installed with `pip install -e`) reads the folder in place, so there is never a second copy to edit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithProfiles(build_py):
    """`build_py` that also copies `ds_configs/`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "pretrain" / "ds_configs"
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted((HERE / "ds_configs").iterdir()):
            shutil.copyfile(source, target / source.name)


setup(cmdclass={"build_py": BuildWithProfiles})
