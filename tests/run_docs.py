"""Run the commands that README and docs/ show, in their order, from the root of a fresh clone.

    python tests/run_docs.py                                    lists them: what would be run, what not
    python tests/run_docs.py --run --images FOLDER --inception FILE --taef2 FOLDER

Runs write into data/ and out/. What needs several GPUs, hours or a download is left out, by name. What
would take more than minutes gets a few steps and images instead. FOLDER holds train/ and test/, each
with a folder of images per class. (tests/test_docs.py checks that all commands parse.)
"""
import argparse
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ("README", "docs/tutorial", "docs/your-images", "docs/results", "docs/metrics",
         "docs/techniques", "docs/extending", "docs/speed", "docs/running")
NEEDS = {  # what a command that is left out contains: what it needs
    "torchrun": "several GPUs", "imagenet": "ImageNet", "hf download": "a download",
    "curl": "a download", "cifar-10-binary": "a download", "checkpoint-last": "a download",
    "facebook/": "a download", "data/mine": "a download (FLUX.2's codec)", "out/mine": "its run",
    "study_": "hours", "out/targets": "a study's runs", "out/nine": "a study's runs",
    "FOLDER-val": "images of your own", "pytest": "minutes of its own"}
SHORT = {  # what would take long: the flags that make it short, of which the last ones count
    "train.py": "--steps 40 --sample-every 20 --save-every 20", "sample.py": "--steps 5",
    "fid.py": "--num-samples 60 --steps 5", "ablations.": "--steps 4", "bench.speed": "--quick",
    "bench.room": "--steps 10 --widths 32", "--model B": "--steps 2 --batch 4 --sample-every 0"}


def commands(page):
    """The commands on a page: of indented lines and of blocks marked as sh."""
    text = (ROOT / f"{page}.md").read_text()
    text = re.sub(r"```sh\n(.*?)```", lambda block: re.sub("^", "    ", block[1], flags=re.M), text,
                  flags=re.S)
    text = re.sub(r"```.*?```", "", text, flags=re.S).replace("\\\n", " ")
    for line in re.findall(r"^    (.+)$", text, re.M):
        line = re.split(r"\s{3,}|\s+#", line.strip())[0]
        for command in line.split(" && "):
            if re.match(r"(\w+=\S+ )*(python|pip|torchrun|srun|hf|curl|bash) ", command):
                yield re.sub(" +", " ", command)


def prepared(command, places):
    """What is run in its stead, or None with what it needs."""
    for sign, need in NEEDS.items():
        if sign in command:
            return None, need
    for program, flags in SHORT.items():
        if program in command:
            command = f"{command} {flags}"
    for name, place in places.items():
        command = re.sub(rf"(?<!\w){name}(?![\w.])", place, command)
    command = re.sub("^pip ", "python -m pip ", command)
    return re.sub("^python ", f"{sys.executable} ", command), None


def main():
    parser = argparse.ArgumentParser(description="Run the commands of README and docs/.")
    parser.add_argument("--run", action="store_true", help="run them, do not only list them")
    parser.add_argument("--images", default="CIFAR", help="folder of train/ and test/")
    parser.add_argument("--inception", default="INCEPTION", help="Inception's weights")
    parser.add_argument("--taef2", default="taef2", help="folder of the tiny codec's weights")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=PAGES, help="some of them")
    args = parser.parse_args()
    places = {"CIFAR": args.images, "FOLDER": f"{args.images}/test", "INCEPTION": args.inception,
              "taef2": args.taef2, "CACHE": "data/cifar10-64", "RUN": "demo-T8-x"}
    failed = 0
    for page in args.pages:
        for command in commands(page):
            words, need = prepared(command, places)
            print(f"{page}: {command}\n    {words or f'left out: needs {need}'}", flush=True)
            if words and args.run:
                done = subprocess.run(words, shell=True, cwd=ROOT, text=True, stderr=subprocess.STDOUT,
                                      stdout=subprocess.PIPE)
                failed += done.returncode != 0
                print(f"    exit code {done.returncode}", flush=True)
                print(done.stdout[-1500:] if done.returncode else "", flush=True)
    print(f"{failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
