"""Without pytest-timeout, as on a borrowed machine, its marker and its setting in pyproject.toml are no errors."""

import pytest


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds that a test may take (pytest-timeout, which is not there)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): how long a test may take (pytest-timeout)")
