"""Which folders go into the wheel, and where.

In a checkout the commands `train`, `sample` and `eval`, their `configs` and the `hydra_plugins`
are folders at the top of the repository. In a wheel these names would become packages of
everyone's site-packages, so there they lie in `deradiff/commands/`, which
`deradiff.command_line` puts on the path of its own process. Everything else is in pyproject.toml.
"""

from setuptools import find_namespace_packages, setup

COMMAND_FOLDERS = ("train", "sample", "eval", "configs", "hydra_plugins")

packages = find_namespace_packages(include=["deradiff", "deradiff.*"])
package_dir = {"": "."}
for folder in COMMAND_FOLDERS:
    package_dir[f"deradiff.commands.{folder}"] = folder
    for package in find_namespace_packages(include=[folder, f"{folder}.*"]):
        packages.append(f"deradiff.commands.{package}")

setup(packages=packages, package_dir=package_dir)
