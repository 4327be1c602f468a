"""Run the commands that README and docs/ show, in their order, from the root of a fresh clone.

    python tests/run_docs.py CIFAR=FOLDER INCEPTION=FILE taef2=FOLDER

Runs write into data/ and out/. What needs several GPUs, hours, a download, another run's results or
torch-fidelity is left out. What would take more than minutes gets a few steps and images instead.
CIFAR holds train/ and test/, each with a folder of images per class. (tests/test_docs.py checks
that all commands parse.)
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ("README", "docs/tutorial", "docs/your-images", "docs/results", "docs/metrics",
         "docs/techniques", "docs/extending", "docs/speed", "docs/running")
LEFT_OUT = (  # what such commands contain
    "torchrun", "imagenet", "hf download", "checkpoint-last", "facebook/", "data/mine", "out/mine",
    "study_", "out/targets", "out/nine", "FOLDER-val", "pytest", "bench.fidelity")
SHORT = {  # what would take long: the flags that make it short, of which the last ones count
    "train.py": "--steps 40 --sample-every 20 --save-every 20", "sample.py": "--steps 5",
    "fid.py": "--num-samples 60 --steps 5", "ablations.": "--steps 4 --batch 16",
    "bench.speed": "--quick", "bench.room": "--steps 10 --widths 32",
    "--model B": "--steps 2 --batch 4 --sample-every 0",
    "--save-ref cifar64.npz": "--size 32"}  # the demo's, which is what the page then scores


def commands(page, language="sh"):
    """The commands on a page: of indented lines and of blocks marked as sh. (Blocks marked as bash
    need a change of the code first, or are to be refused.)"""
    text = (ROOT / f"{page}.md").read_text().replace("\\\n", " ")
    blocks = re.findall(rf"```(?:{language})\n(.*?)```", text, re.S)
    indented = "".join(f"    {line}\n" for block in blocks for line in block.splitlines())
    text = indented + re.sub("```.*?```", "", text, flags=re.S)
    for line in re.findall(r"^    (.+)$", text, re.M):
        line = re.split(r"\s{3,}|\s+#", line.strip())[0]
        for command in line.split(" && "):
            if re.match(r"(\w+=\S+ )*(python|pip|torchrun|srun|hf|bash) ", command):
                yield re.sub(" +", " ", command)


def main(words):
    places = {"CACHE": "data/cifar10-64", "RUN": "demo-T8-x", "FOLDER": "CIFAR/test"}
    places |= dict(word.split("=") for word in words)
    failed = 0
    for command in (command for page in PAGES for command in commands(page)):
        if any(sign in command for sign in LEFT_OUT):
            print(f"left out: {command}")
            continue
        command += "".join(f" {flags}" for program, flags in SHORT.items() if program in command)
        for name, place in places.items():
            command = re.sub(rf"(?<!\w){name}(?![\w.])", place, command)
        command = re.sub("^pip ", "python -m pip ", command)
        command = re.sub("^python ", f"{sys.executable} ", command)
        print(command, flush=True)
        if subprocess.run(command, shell=True, cwd=ROOT).returncode:
            print("FAILED")
            failed += 1
    print(f"{failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
