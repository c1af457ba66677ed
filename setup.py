"""What pyproject.toml cannot say: `gin/` and `configs/` travel inside the package.

At the top of site-packages `gin/` would overwrite gin-config, so a wheel holds them as
`stepdistill_jax/_gin` and `stepdistill_jax/_configs`; `commands/shipped.py` finds either place.
"""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
FOLDERS = ("gin", "configs")


class BuildWithConfigs(build_py):
    """Copies the folders beside the modules; an editable install reads them from the checkout."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name in FOLDERS:
            target = pathlib.Path(self.build_lib, "stepdistill_jax", f"_{name}")
            # build/ may hold files of an earlier build that are gone since
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(HERE / name, target, ignore=lambda _, names: _not_gin(names))

    def get_outputs(self, include_bytecode=1):
        package = pathlib.Path(self.build_lib, "stepdistill_jax")
        copied = [str(p) for name in FOLDERS for p in (package / f"_{name}").rglob("*.gin")]
        return super().get_outputs(include_bytecode) + copied


def _not_gin(names):
    return [name for name in names if "." in name and not name.endswith(".gin")]


setup(cmdclass={"build_py": BuildWithConfigs})
