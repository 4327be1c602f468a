"""Nothing in README or docs/ refers to a file, a flag or a line of code that is not there."""
import argparse
import re
import runpy
import shlex
import sys

import pytest
from run_docs import commands

import fid
import sample
import train
import vae
from lib.flags import Parser
from test_all import ROOT

PAGES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
OTHERS = set("--nproc_per_node --nnodes --rdzv-backend --rdzv-endpoint --rdzv-id --max-restarts "
             "--nodes --ntasks-per-node --gpus-per-node --signal --requeue --local-dir --repo-type "
             "--include".split())


def sources():
    return "\n".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_files_and_links_exist(page):
    text = page.read_text()
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))
    assert not used - set(re.findall(r'"(--[a-z0-9-]+)"', sources() + text)) - OTHERS
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    folders = "lib|bench|tests|docs|ablations|assets"
    for name in re.findall(rf"`((?:{folders})/[\w./*-]*|\w+\.py)`", text):
        assert list(ROOT.glob(name.rstrip("/"))), name
    for name in re.findall(r"`([\w-]+\.(?:csv|txt|md))`", text):
        exists = any((ROOT / folder / name).exists() for folder in ("assets/logs", "docs"))
        assert exists or name in ("log.csv", "fid.csv", "facts.txt"), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_is_quoted_is_the_code(page):
    """Line by line, apart from comments and indentation."""
    lines = {line.split("  #")[0].strip() for line in sources().splitlines()}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        for line in block.splitlines():
            quoted = line.split("  #")[0].strip()
            assert not quoted or quoted[0] == "#" or quoted in lines, quoted


class Parsed(Exception):
    """Ends a program once its flags are parsed."""


def only_parse(parser, argv=None):
    argparse.ArgumentParser.parse_args(parser, argv)
    raise Parsed


def test_commands_parse(monkeypatch):
    """Every command of a program, an ablation or bench/ on the pages, without running it."""
    programs, seen = {"vae.py": vae, "train.py": train, "sample.py": sample, "fid.py": fid}, 0
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(train.TARGETS, "u", (2, -1))  # the tutorial has it added
    for page in PAGES:
        for command in commands(page.relative_to(ROOT).with_suffix(""), "sh|bash"):
            words = shlex.split(command)
            for i, word in enumerate(words):
                if word in programs:
                    programs[word].parse(words[i + 1:])
                    seen += 1
                elif word.startswith(("ablations.", "bench.")):
                    with monkeypatch.context() as patch, pytest.raises(Parsed):
                        patch.setattr(Parser, "parse_args", only_parse)
                        patch.setattr(sys, "argv", words[i:])
                        patch.delitem(sys.modules, word, raising=False)  # or runpy warns
                        runpy.run_module(word, run_name="__main__")
                    seen += 1
    assert seen > 60
