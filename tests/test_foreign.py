"""Code from the model hub: nothing that a library fetches by itself is run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY, tiny

# What transformers and bitsandbytes take from the package; every use of it tells its name.
KERNELS = """
import os
with open(os.environ["MARKER"], "a") as out:
    out.write("imported ")
def __getattr__(name):
    with open(os.environ["MARKER"], "a") as out:
        out.write(name + " ")
    return lambda *args, **options: (lambda taken: taken)
"""

IMPORTS = "import bitsandbytes, peft, transformers.integrations.hub_kernels, transformers.modeling_utils"


def test_no_library_of_the_program_gets_the_package_that_fetches_kernels(tmp_path: Path) -> None:
    package, marker = tmp_path / "kernels", tmp_path / "marker"
    package.mkdir()
    (package / "__init__.py").write_text(KERNELS)
    information = tmp_path / "kernels-0.16.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.0\n")
    code = f"""
import importlib.util
assert importlib.util.find_spec("kernels")
from safesteer_lite.shell.cli import main
main(["presets"])
{IMPORTS}
"""
    paths = os.pathsep.join((str(REPOSITORY), str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": paths, "MARKER": str(marker)}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, env=environment)
    assert not marker.exists()


def test_whoever_loads_a_model_without_the_command_line_is_kept_from_it_too(
    monkeypatch: pytest.MonkeyPatch, tiny_policy: tiny.Loader
) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    tiny_policy()
    with pytest.raises(ImportError, match="kernels"):
        importlib.import_module("kernels")
