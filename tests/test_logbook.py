"""The runner of studies: what it asks of train.py and fid.py, what it does not do again."""
import argparse
import pathlib

import pytest

import fid
import train
from ablations import logbook
from ablations.studies import nine, targets, techniques
from lib.flags import Parser
from lib.log import error_columns, write_table


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The flags and techniques of every run, whose logs are made up; no score but 1 / scale."""
    calls = []

    def learn(argv, technique):
        calls.append((argv, technique))
        run = pathlib.Path(argv[argv.index("--out") + 1])
        run.mkdir(parents=True, exist_ok=True)
        row = dict.fromkeys(["step", "images_per_s", *error_columns("fit")], 2.0) | {"step": 8}
        write_table(run / "log.csv", list(row), [row])
        return 0

    def score(argv):
        calls.append((argv, None))
        run, n = pathlib.Path(argv[1]).parent, argv[argv.index("--num-samples") + 1]
        args = fid.parse(argv)
        known = fid.read_scores(run / "fid.csv", fid.COLUMNS)
        for scale in args.cfg:
            known.append({"n": n, "cfg": f"{scale:g}", "fid": str(1 / scale), "mmd": str(scale),
                          "method": args.method, "t_eps": "0.05"})
        write_table(run / "fid.csv", fid.COLUMNS, known)
        return 0
    monkeypatch.setattr(train, "main", learn)
    monkeypatch.setattr(fid, "main", score)
    monkeypatch.setattr(fid, "load_reference", lambda path, metrics: None)
    monkeypatch.setattr(fid, "load_judges", lambda metrics, inception: None)
    monkeypatch.setattr(logbook, "estimate", lambda args, rows: len(rows))
    monkeypatch.setattr(logbook, "load_teacher", lambda name, size: None)
    monkeypatch.setattr(train.codec, "LatentDataset", lambda path: argparse.Namespace(size=64))
    return calls


def study(name, tmp_path, *more):
    return logbook.main(["--study", name, "--latents", "cache", "--out", str(tmp_path),
                         "--steps", "8", *more])


def test_the_nine_combinations_and_two_second_seeds(asked, tmp_path, capsys):
    assert study("nine", tmp_path, "--precision", "fp32") == 0
    assert len(asked) == 11 and all(argv[-2:] == ["--precision", "fp32"] for argv, _ in asked)
    assert "--target eps --loss x --precision" in " ".join(asked[4][0])
    assert "--target v --loss v --seed 1" in " ".join(asked[-1][0])
    assert "| eps-xloss-seed0 | 8 | 2 | 2 | 2 |" in capsys.readouterr().out


def test_the_guidance_scale_is_searched_with_few_images_and_the_best_one_scored(asked, tmp_path):
    assert study("targets", tmp_path, "--ref", "r.npz", "--only", "eps-2-seed0", "v-1-seed1") == 0
    words = [" ".join(argv) for argv, _ in asked]
    assert "--target eps --patch 2" in words[0] and words[5].count("--seed 1") == 1
    scored = [word.split("--num-samples ")[1] for word in words if "--num-samples" in word]
    assert scored == ["5000 --cfg 1", "5000 --cfg 1 --t-eps 0.02",
                      "1000 --cfg 1.5 2 3 --method ab2 --steps 25", "5000 --cfg 3",
                      "5000 --cfg 1"]


def test_where_fid_is_not_measured_the_scale_is_searched_by_mmd(asked, tmp_path):
    more = "--ref", "r.npz", "--metrics", "mmd", "--only", "x-1-seed0"
    assert study("targets", tmp_path, *more) == 0
    assert asked[-1][0][-2:] == ["--cfg", "1.5"]


def test_techniques_are_trained_by_their_classes_and_repa_where_there_is_a_teacher(asked, tmp_path):
    assert study("techniques", tmp_path, "--teacher", "a file", "--hidden", "64") == 0
    names = [technique and technique.name for _, technique in asked]
    assert names == [None, None, "contrastive", "tread", "repa", "repa", "repa",
                     "repa-contrastive", "repa-tread"]
    assert "a file" in asked[6][0]
    assert "--teacher a file --hidden 64 --until 2" in " ".join(asked[6][0])
    args = Parser("").parse_args([])
    args.teacher, args.hidden, args.steps = None, 64, 8
    assert [row.name for row in techniques(args)] == ["plain", "plain-seed1", "contrastive",
                                                      "tread"]
    assert len(targets(args)) == 10 and len({row.name for row in nine(args)}) == 11


def test_a_study_that_is_stopped_stops(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "main", lambda argv, technique: 143)
    assert study("nine", tmp_path) == 143


@pytest.mark.parametrize("study, words, told", [
    ("nine", ["--ref", "nowhere.npz"], "nowhere.npz"),
    ("techniques", ["--teacher", "no.module:here"], "no.module:here"),
    ("nine", ["--only", "x-2"], "--only x-2: expected some of x-vloss-seed0"),
    ("nine", ["--model", "Q"], "--model: invalid choice: 'Q'"),
    ("nine", ["--patch", "3"], "--patch 3: does not divide 8")])
def test_what_will_be_needed_is_seen_to_before_training(
        monkeypatch, tmp_path, refused, study, words, told):
    from test_all import small_cache
    monkeypatch.setattr(train, "main", lambda argv, technique: pytest.fail("it has begun"))
    refused(logbook.main, ["--study", study, "--latents", small_cache(tmp_path), "--out", tmp_path,
                           *words], told)


def test_torchrun_is_refused(monkeypatch, tmp_path, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(logbook.main, ["--study", "nine", "--latents", tmp_path], "without torchrun")


def test_hours_are_estimated_from_a_few_steps(tmp_path):
    from test_all import small_cache
    args = Parser("").parse_args([])
    args.latents, args.patch, args.model = small_cache(tmp_path), 4, "T"
    args.steps, args.batch = 1000, 100
    one, three = (logbook.estimate(args, [0] * n) for n in (1, 3))
    assert 0 < one < 10 and one < 2 * three
