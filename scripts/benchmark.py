"""Measure what the parts of this suite cost on this machine, and write docs/benchmarks.

python scripts/benchmark.py regularizers
python scripts/benchmark.py regularizers --batch 8 --pairs 31 --threads 1
python scripts/benchmark.py regularizers --measures linear --output /tmp/benchmarks
python scripts/benchmark.py video --help

Times are ratios of neighbouring runs; still, give it a machine that does nothing else.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module

from mistakes import mistakes_in_one_line

import adapters  # noqa: F401  (before timm)

SUBJECTS = {
    "regularizers": "Table 6 of the ReSoRA paper: time, memory and FLOPs that each penalty adds to a step of ViT-B/16",
    "adapters": "time, memory and FLOPs of each adapter's training step on ViT-B/16 and BERT-base",
    "training": "a training step of VSE-infinity's text side: LoRA, full fine-tuning, buckets of similar length",
    "parameters": "trained parameters of the paper's tables, ours beside the paper's",
    "video": "clips read a second, from the file and from the frame cache, beside the way of CLIP4Clip's authors",
}
"""Module of `benchmarks` -> what it measures. It has `Settings` and `run(settings) -> (page, raw numbers or None)`."""


def main(arguments: list[str] | None = None) -> None:
    subjects = "".join(f"\n  {name:13} {what}" for name, what in SUBJECTS.items())
    parser = ArgumentParser(
        description=f"{__doc__}\nSubjects:{subjects}", formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("subject", choices=SUBJECTS, metavar="subject", help="what is measured")
    parser.add_argument("options", nargs=REMAINDER, help="of the subject; `benchmark.py <subject> --help` lists them")
    given = parser.parse_args(arguments)
    with mistakes_in_one_line():
        run_subject(given.subject, given.options)


def run_subject(name: str, arguments: list[str]) -> None:
    """Measure one subject; print its page and write it, with the raw numbers beside it."""
    import torch
    from benchmarks.options import from_command_line

    subject = import_module(f"benchmarks.{name}")
    settings = from_command_line(subject.Settings, f"benchmark.py {name}", SUBJECTS[name], arguments)
    torch.set_num_threads(settings.threads)
    page, numbers = subject.run(settings)
    print(f"\n{page}")
    settings.write(name, page, numbers)
    print(f"written to {settings.output}/{name}.md{'' if numbers is None else ' and .json'}")


if __name__ == "__main__":
    main()
