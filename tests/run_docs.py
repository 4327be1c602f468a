"""Run every command that README and docs/ show, in their order, from this folder.

    python tests/run_docs.py                                 list them: what would be run, what not
    python tests/run_docs.py --run --images FOLDER --inception FILE --taef2 FOLDER

For a fresh clone and a fresh environment: runs write into data/ and out/. What needs several GPUs,
ImageNet or a download is left out, by name. What would take more than minutes gets a few steps and
images instead, and says so. FOLDER holds train/ and test/, each with a folder of images a class.
"""
import argparse
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README", "docs/tutorial", "docs/your-images", "docs/results", "docs/metrics",
         "docs/techniques", "docs/extending", "docs/speed", "docs/running")
NEEDS = {  # what a command that is left out contains: why
    "torchrun": "several GPUs", "srun": "a cluster", "imagenet": "ImageNet",
    "hf download": "a download", "checkpoint-last": "a download", "dinov2": "a download",
    "cifar-10-binary": "a download", "/mine": "a download (FLUX.2's codec)",
    "git clone": "an address", "--target u": "the edit that the text asks for",
    "pytest": "run apart"}
SHORT = {  # what takes long, the first that fits: flags that make it short; a flag's last counts
    "--model B": "--steps 2 --batch 4 --sample-every 0", "ablations.tread": "--steps 2 --batch 4",
    "train.py": "--steps 40 --sample-every 20 --save-every 20", "sample.py": "--steps 5",
    "fid.py": "--num-samples 60 --steps 5", "vae.py": "",
    "ablations.contrastive": "--steps 4",
    "ablations.logbook": "--steps 4",
    "bench.speed": "--quick --only reading",
    "bench.solvers": "--evaluations 7 --solvers ab2 --num-samples 12",
    "bench.room": "--steps 10 --widths 32",
    "bench.digits": "--n 100 --steps 5",
    "bench.progress": "--ode-steps 5", "bench.cost": "--turns 2"}
OLD = re.compile(r"--(steps|num-samples|fid-n|keep-every|ode-steps) \S+ ?")
REF = re.compile(r"--ref \S+ ?")  # without it a study trains, and scores nothing


def commands(pages):
    """(page, command) of every indented line that starts a program."""
    for page in pages:
        text = (ROOT / f"{page}.md").read_text()
        text = re.sub(r"```.*?```", "", text, flags=re.S).replace("\\\n", " ")
        for line in re.findall(r"^    (.+)$", text, re.M):
            line = re.split(r"\s{3,}|\s+#", line.strip())[0]
            for part in line.split(" && "):
                if re.match(r"(python|pip|torchrun|srun|git|hf|curl) ", part):
                    yield page, re.sub(r" +", " ", part)


def prepared(command, given):
    """(what is run, or None; how it differs, or why it is not)."""
    for sign, why in NEEDS.items():
        if sign in command:
            return None, f"needs {why}"
    words, program = command, next((name for name in SHORT if name in command), None)
    if program:
        words = f"{OLD.sub('', command)} {SHORT[program]}"
        if program == "ablations.logbook":
            words = REF.sub("", words)
    note = "as it stands" if words.split() == command.split() else "shortened"
    for name, value in given.items():
        words = re.sub(rf"(?<!\w){name}(?![\w.])", value, words)
    words = words.replace("python ", f"{sys.executable} ", 1)
    return words.replace("pip install", f"{sys.executable} -m pip install -q", 1), note


def main():
    parser = argparse.ArgumentParser(description="Run the commands of README and docs/.")
    parser.add_argument("--run", action="store_true", help="run them, do not only list them")
    parser.add_argument("--images", default="CIFAR", help="folder of train/ and test/")
    parser.add_argument("--inception", default="INCEPTION", help="Inception's weights")
    parser.add_argument("--taef2", default="taef2", help="folder of the tiny codec's weights")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=PAGES, help="some of them")
    args = parser.parse_args()
    given = {"CIFAR": args.images, "FOLDER": f"{args.images}/test", "INCEPTION": args.inception,
             "taef2": args.taef2, "CACHE": "data/cifar10-64", "RUN": "targets/x-1-seed0"}
    failed = 0
    for page, command in commands(args.pages):
        words, note = prepared(command, given)
        print(f"{page}: {command}\n    {note}", flush=True)
        if words and args.run:
            start = time.monotonic()
            done = subprocess.run(words, shell=True, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
            failed += done.returncode != 0
            print(f"    {words}\n    exit code {done.returncode}, "
                  f"{time.monotonic() - start:.0f} s", flush=True)
            if done.returncode:
                print(done.stdout[-1500:], flush=True)
    print(f"{failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
