"""Runs lm-evaluation-harness in a process of its own: it imports much, and some of that warns.

python lm_eval_run.py BASE_URL TASKS_FOLDER MODEL_ARGS_JSON     # the samples of each task, as JSON
"""

from __future__ import annotations

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main(base_url: str, folder: str, model_args: str) -> None:
    results = simple_evaluate(
        model="local-completions",
        model_args={"base_url": base_url, **json.loads(model_args)},
        tasks=["capitals", "capitals_written"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
    )
    samples = {
        task: [[sample["arguments"], sample["filtered_resps"]] for sample in found]
        for task, found in results["samples"].items()
    }
    scores = {task: {k: float(v) for k, v in found.items() if "," in k and "stderr" not in k}
              for task, found in results["results"].items()}  # fmt: skip
    print(json.dumps({"samples": samples, "scores": scores}))


if __name__ == "__main__":
    main(*sys.argv[1:])
