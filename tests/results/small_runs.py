"""Small runs of several kinds, for the tests of what is done with a run's model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedprompt.config import compose
from fedprompt.data.task import Task, datasets

SMALL = [f"data.{split}=80" for split in ("train", "validation", "test", "public")]
VARIANTS = {
    "clients' metric": ["compare=[fedavg_pt, head_only]"],
    "public images": ["prompts.whiten=public", "compare=[]"],
    "soft": ["prompts.query=both", "prompts.choice=soft", "compare=[]"],
    "deep, adapters": ["prompts.depth=2", "tuning=adapter", "compare=[]"],
    "l2p": ["method=pfpt_plus", "prompts.pool=8", "compare=[]"],
    "personal": ["head.mode=personal", "compare=[]"],
    "generator": ["method=pfedpg", "compare=[]"],
}


def task_of(run_dir: Path) -> Task:
    config = compose(run_dir / "config.yaml")
    return datasets.create(config.data.name, **dataclasses.asdict(config.data.options))
