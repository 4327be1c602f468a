"""docs/nanojlt.ipynb: its code cells run in order, with small settings and without Jupyter."""
import json
import os
import subprocess
import sys

import pytest

import vae
from lib.images import draw_digits
from test_all import ROOT

NOTEBOOK = json.loads((ROOT / "docs/nanojlt.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_code_cells_run_in_order(tmp_path):
    pytest.importorskip("matplotlib")
    digits, cache = draw_digits(tmp_path / "digits", per_class=2), tmp_path / "cache"
    flags = "--vae", "pixels", "--size", "32", "--no-flip"
    assert vae.main(["--images", str(digits), "--out", str(cache), *flags]) == 0
    demo = ["--demo", "--latents", str(cache), "--steps", "4", "--batch", "4", "--warmup", "0",
            "--patch", "32", "--sample-every", "4", "--log-every", "2"]  # 1 token: fast
    small = f"STEPS, TOY_STEPS, DEMO = 4, 2, {demo!r}"
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join([CODE[0], small, *CODE[1:]]))  # the settings come first
    environment = os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for target in ("x", "v"):
        assert f"predicts {target}: fit " in done.stdout
    assert "predicts (2, -1): fit " in done.stdout
    assert (tmp_path / "out/notebook-x-4/ema.safetensors").exists()


def test_outputs_are_not_stored():
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])
