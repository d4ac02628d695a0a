"""Refuse a Python that moeflow cannot use, in words. Runs on any Python, so no modern syntax here."""

import sys

version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(
        "moeflow needs Python 3.11 to 3.13; %s is %s. Choose another: make PYTHON=python3.12 ..."
        % (sys.executable, version)
    )
try:
    import ensurepip  # noqa: F401
    import venv  # noqa: F401
except ImportError:
    sys.exit("%s cannot make virtual environments; on Debian: apt-get install python3-venv" % sys.executable)
