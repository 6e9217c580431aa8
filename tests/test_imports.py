"""Who may import what, read from the source: the seams of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gqa_serve

ROOT = Path(gqa_serve.__file__).parent
NO_TORCH = [
    "block_pool", "kv_manager", "scheduler", "request", "wire", "client", "process", "model_config",
    "admission", "channel", "endings", "metrics", "out_of_memory", "stock", "token_stream", "watchdog",
    "constraints", "constrained", "structured", "grammars", "replicas", "routing", "placement",
]  # fmt: skip
NO_TEXT = [
    "core", "scheduler", "sampler", "kv_manager", "block_pool", "batch", "model_runner", "process",
    "constraints", "constrained", "endings", "hidden_rows", "stock", "channel",
    "replicas", "routing",
]  # fmt: skip
TEXT = {"tokenizer", "detokenizer", "chat_template", "stop_strings", "chat_messages", "gguf_tokenizer"}


def imports(path: Path, *, top_level: bool) -> Iterator[str]:
    """Dotted names that a file imports; with `top_level`, only those that importing it executes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize("name", NO_TORCH)
def test_decisions_need_no_torch(name: str) -> None:
    found = {module.split(".")[0] for module in imports(ROOT / "engine" / f"{name}.py", top_level=True)}
    assert "torch" not in found


PLANNING = [
    *(ROOT / "workbench").glob("*cost*.py"),
    *(ROOT / "workbench" / "plan").glob("*.py"),
    *(ROOT / "workbench" / "simulate").glob("*.py"),
    *(
        ROOT / "workbench" / f"{name}.py"
        for name in ("hardware", "machine", "model_source", "sharding", "report", "plots", "records", "trace")
    ),
    ROOT / "engine" / "memory.py",
]


@pytest.mark.parametrize("path", sorted(PLANNING), ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_the_planning_tools_need_no_torch(path: Path) -> None:
    found = {module.split(".")[0] for module in imports(path, top_level=False)}
    assert "torch" not in found


@pytest.mark.parametrize("name", ["plan", "simulate"])
def test_tools_that_compute_nothing_need_no_torch(name: str) -> None:
    for path in (ROOT / "workbench" / name).glob("*.py"):
        found = {module.split(".")[0] for module in imports(path, top_level=False)}
        assert not found & {"torch", "transformers"}, path


@pytest.mark.parametrize("name", NO_TEXT)
def test_the_engine_never_sees_text(name: str) -> None:
    for module in imports(ROOT / "engine" / f"{name}.py", top_level=False):
        assert module.rsplit(".", 1)[-1] not in TEXT
        assert module != "tokenizers"


def test_the_engine_knows_no_http() -> None:
    for path in (ROOT / "engine").rglob("*.py"):
        for module in imports(path, top_level=False):
            assert module.split(".")[0] not in ("starlette", "uvicorn", "sse_starlette"), path
            assert not module.startswith(("gqa_serve.api", "gqa_serve.server")), path


def test_only_config_reads_the_environment() -> None:
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("os.environ", "os.getenv", "os.environb"), path


def test_no_pickle_anywhere() -> None:
    for path in ROOT.rglob("*.py"):
        for module in imports(path, top_level=False):
            assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "marshal"), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "torch.load", path


@pytest.mark.parametrize(
    "statement",
    [
        "import gqa_serve",
        "import gqa_serve.cli",
        "import gqa_serve.server, gqa_serve.engine.weights.gguf",
        "import gqa_serve.workbench.cost_tables",
        "import gqa_serve.workbench.plan.command",
        "import gqa_serve.workbench.simulate.command, gqa_serve.workbench.simulate.runs",
    ],
)
def test_importing_costs_no_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
