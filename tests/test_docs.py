"""Nothing in README or docs refers to a file, a flag or a line of code that is not there."""
import re

import pytest

import fid
import sample
from ablations import NAMES, load
from lib.flags import training_args
from model import SIZES, TARGETS
from test_all import ROOT
from train import PRESETS

PAGES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
CODE = re.compile(r"```python\n(.*?)```", re.S)


def sources():
    return "\n".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")))


def known_flags():
    """All that a program takes: what stands in quotes, dashes first, somewhere in the sources."""
    return set(re.findall(r'"(--[a-z0-9-]+)"', sources())) | {
        f"--{option}" for name in NAMES for option in load(name).options} | {
        f"--{name}-{option}" for name in NAMES for option in load(name).options} | {
        "--no-compile", "--help"} | {f"--{name}" for name in (
            "model patch batch lr steps warmup decay ema").split()}


OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id",
          "--ntasks-per-node", "--no-deps", "--max-restarts", "--local-dir", "--signals-to-handle"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_files_and_links_exist(page):
    text = page.read_text()
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))
    assert used <= known_flags() | OTHERS, used - known_flags() - OTHERS
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    named = re.findall(r"`((?:lib|bench|tests|docs|ablations|assets)/[\w./-]*)`", text)
    named += re.findall(r"`(\w+\.py)`", text)
    for name in named:
        assert list(ROOT.glob(name.rstrip("/"))), name
    for module in re.findall(r"python -m ((?:bench|ablations)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for log in re.findall(r"`([\w-]+\.(?:csv|txt|md))`", text):
        assert log in ("log.csv", "fid.csv") or list(ROOT.glob(f"assets/logs/{log}")) or list(
            ROOT.glob(f"docs/{log}")), log


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_is_quoted_is_the_code(page):
    """Line by line, comments and indentation apart."""
    lines = {line.split("  #")[0].strip() for line in sources().splitlines()}
    for block in CODE.findall(page.read_text()):
        for line in block.splitlines():
            quoted = line.split("  #")[0].strip()
            assert not quoted or quoted[0] == "#" or quoted in lines, quoted


def test_training_commands_parse():
    """Every command of train.py, sample.py and fid.py on the pages, without running it."""
    seen = 0
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for program, words in re.findall(r"^    .*?\b(train|sample|fid)\.py (.*)$", text, re.M):
            argv = words.split("#")[0].split("&&")[0].split()
            if program == "train":
                training_args(argv, PRESETS, [*TARGETS, "u"], SIZES)
            else:
                {"sample": sample, "fid": fid}[program].parse(argv)
            seen += 1
    assert seen > 20
