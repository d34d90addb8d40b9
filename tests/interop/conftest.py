"""--nothing-skipped: `make test-interop` fails if a package that the tests compare with is missing."""

import pytest

from fastseg import _library


def pytest_addoption(parser):
    parser.addoption("--nothing-skipped", action="store_true", help="fail if a test is skipped, or none runs")


def pytest_configure(config):
    if config.getoption("--nothing-skipped") and _library.CPU_LEVEL is None:
        pytest.exit(f"--nothing-skipped: {_library.missing('cpu')}", returncode=3)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--nothing-skipped") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
