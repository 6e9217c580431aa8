"""Memory that really runs out: a limit on the address space of a process that has loaded the demo model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MARGIN_BYTES = 8 * 2**20
"""What may be allocated beyond what the process has after loading; a step of 1,500 tokens wants more."""


def serve(backend: str) -> None:
    """In a process of its own: the same requests first with little memory, then with all there is."""
    import resource

    from demo_model import demo_path
    from fake_runner import request, run, tokens_of

    from gqa_serve.config import EngineConfig
    from gqa_serve.engine.core import Engine
    from gqa_serve.engine.model_runner import ModelRunner

    config = EngineConfig(
        model="demo", backend=backend, kv_cache_memory=2**29, quantization="none", prefix_caching=False
    )
    runner = ModelRunner(demo_path(), config)

    def answers() -> tuple[dict[str, list[int]], int]:
        engine = Engine(runner, config)
        engine.add(request("long", [number * 37 % 40_000 + 100 for number in range(1500)], max_tokens=4))
        for number in range(6):
            engine.add(request(f"r{number}", [100 + number, 200, 300], max_tokens=12))
        num_cuts = 0
        step = engine.step

        def counted() -> object:
            nonlocal num_cuts
            outputs = step()
            num_cuts += engine.stats.num_shrunk
            return outputs

        engine.step = counted  # type: ignore[method-assign, assignment]
        outputs = run(engine)
        return {name: tokens_of(parts) for name, parts in outputs.items()}, num_cuts

    warm = Engine(runner, config)
    warm.add(request("warm", [5, 6, 7], max_tokens=2))
    run(warm)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MARGIN_BYTES, hard))
    short = answers()
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    print(json.dumps([short, answers()]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_requests_answer_the_same_when_memory_runs_out() -> None:
    """With the reference backend, whose temporaries are the larger ones."""
    folder = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(folder.parent)!r}]\n"
    code += "import test_shortage_slow; test_shortage_slow.serve('reference')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True
    )
    (short, num_cuts), (whole, num_cuts_of_whole) = json.loads(done.stdout)
    assert short == whole
    assert num_cuts > 0
    assert num_cuts_of_whole == 0
