"""The version has one source, which the installed package shows as well."""

import importlib.metadata
import pathlib
import tomllib

import dot_optax

ROOT = pathlib.Path(__file__).parent.parent


def test_the_package_is_built_with_the_version_that_it_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert ROOT / project["tool"]["hatch"]["version"]["path"] == pathlib.Path(dot_optax.__file__)


def test_the_installed_package_has_it():
    assert importlib.metadata.version("dot_optax") == dot_optax.__version__
