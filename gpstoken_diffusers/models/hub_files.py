"""Official files on the Hub: their names, their headers before anything large is fetched, and the download.

huggingface_hub does the work: its cache, progress bar, tokens, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict
from urllib.parse import unquote, urlsplit

import torch
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from torch import Tensor

REPOSITORY = "xtudbxk/GPSToken"
RELEASES = {name: f"{REPOSITORY}/gpstoken_{name}.safetensors" for name in ("s64", "m128", "l256")}
"""Short names of the released tokenizers, which stand for OWNER/REPO/FILE."""

# What a tokenizer's folder consists of, alone or in a pipeline's.
_FOLDER_FILES = ["config.json", "preprocessor_config.json", "diffusion_pytorch_model*.safetensors*", "autoencoder/*"]
_HOSTS = ("huggingface.co", "hf.co")
_REVISION_AND_FILE = re.compile(r"(?:blob|resolve|raw)/(refs/[^/]+/[^/]+|[^/]+)/(.+)")


class HubOptions(TypedDict, total=False):
    """How the Hub is asked, as in diffusers and huggingface_hub."""

    cache_dir: str | os.PathLike | None
    force_download: bool
    proxies: dict[str, str] | None
    token: str | bool | None
    local_files_only: bool
    revision: str | None


@dataclass(frozen=True)
class HubFile:
    """A safetensors file of a repository of the Hub.

    Attributes:
        repository: OWNER/REPO.
        name: its path in the repository.
        revision: branch, tag or commit, where the location says one.
    """

    repository: str
    name: str
    revision: str | None = None

    def fetch(self, check: Callable[[dict[str, Tensor]], None], options: HubOptions) -> Path:
        """The file in the cache, downloaded if it is not there.

        Args:
            check: is given the tensors of the file without their numbers (on "meta") before a download, to raise what
                it finds wrong.
            options: how the Hub is asked.

        Raises:
            ValueError: not a safetensors file, another revision in the location than in the options, or what `check`
                raises.
            FileNotFoundError: no such file, or neither the Hub can be reached nor is the file in the cache.
            OSError: the cache cannot be written to, or the Hub refuses.
        """
        revision = options.get("revision")
        if self.revision not in (None, "main", revision) and revision is not None:
            raise ValueError(f"The location says revision {self.revision!r}, the argument {revision!r}: give one.")
        revision = revision or self.revision
        options = {**options, "revision": revision}
        where = {"cache_dir": options.get("cache_dir"), "revision": revision}
        try:
            cached = isinstance(try_to_load_from_cache(self.repository, self.name, **where), str)
            if not options.get("local_files_only") and (options.get("force_download") or not cached):
                check(self._header(revision, options.get("token")))
            return Path(hf_hub_download(self.repository, self.name, **options))
        except SafetensorsParsingError as error:
            raise ValueError(f"{self}: not a whole safetensors file ({error}).") from error
        except HFValidationError as error:
            raise FileNotFoundError(f"No checkpoint at {self}: there is no such file, and {error}") from error
        except (ValueError, TypeError) as error:
            if isinstance(error, LocalEntryNotFoundError):  # a ValueError too before huggingface_hub 1.0
                raise self._told(error, options) from error
            raise
        except Exception as error:  # which ones, when the network fails, depends on the version of huggingface_hub
            raise self._told(error, options) from error

    def _header(self, revision: str | None, token: str | bool | None) -> dict[str, Tensor]:
        metadata = HfApi().parse_safetensors_file_metadata(self.repository, self.name, revision=revision, token=token)
        return {name: torch.empty(info.shape, device="meta") for name, info in metadata.tensors.items()}

    def _told(self, error: Exception, options: HubOptions) -> OSError:
        """An error of huggingface_hub in words that help a user of this package."""
        hub, cache = constants.ENDPOINT, options.get("cache_dir") or constants.HF_HUB_CACHE
        page = f"{hub}/{self.repository}/blob/{options.get('revision') or 'main'}/{self.name}"
        if isinstance(error, GatedRepoError):
            return OSError(f"{page} is there for those who agree to its terms: do so, then give token=... ({error})")
        if isinstance(error, RepositoryNotFoundError):
            return FileNotFoundError(
                f"No checkpoint at {self}: there is no such file here, and {hub} has no repository {self.repository}, "
                "or a private one, which needs token=... or `hf auth login`."
            )
        if isinstance(error, RevisionNotFoundError):
            return FileNotFoundError(f"{self.repository} has no revision {options.get('revision')!r}.")
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return FileNotFoundError(f"No checkpoint at {self}: {hub}/{self.repository} has no file {self.name}.")
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            return OSError(
                f"cannot download {self} to the cache {cache} ({error.strerror}). Give another place: cache_dir=..., "
                "or the environment variable HF_HOME."
            )
        reason = str(error.__cause__ or error).splitlines()[0]
        return FileNotFoundError(
            f"No checkpoint at {self}: there is no such file here nor in the cache {cache}, and it could not be "
            f"downloaded ({reason}). Fetch {page} on a machine with a network, copy it here, and give its path."
        )

    def __str__(self) -> str:
        return f"{self.repository}/{self.name}"


def hub_file(location: str) -> HubFile | None:
    """The file of the Hub that a location names; None where it names none.

    Args:
        location: OWNER/REPO/FILE, a short name of `RELEASES`, or an address of the Hub, with or without `https://`,
            with `blob/`, `resolve/` or `raw/` and a revision, or without; FILE may lie in folders.

    Raises ValueError: an address of another site, or of a file that is not safetensors.
    """
    address = urlsplit(location if "://" in location else f"//{location}")
    hosts = (*_HOSTS, urlsplit(constants.ENDPOINT).netloc)
    if address.netloc in hosts or address.netloc.removeprefix("www.") in hosts:
        path = address.path
    elif "://" in location:
        raise ValueError(f"{location}: only files of the Hub are downloaded (https://{_HOSTS[0]}/OWNER/REPO/...).")
    else:
        path = RELEASES.get(location, location)
        if path.startswith((".", "/", "~")) or "\\" in path:
            return None
    owner, _, rest = unquote(path).strip("/").partition("/")
    repo, _, name = rest.partition("/")
    revision = None
    if match := _REVISION_AND_FILE.fullmatch(name):
        revision, name = match.groups()
    if name.endswith(".safetensors"):
        return HubFile(f"{owner}/{repo}", name, revision)
    if address.netloc in hosts:
        raise ValueError(f"{location} names no .safetensors file: official models are read from those alone.")
    return None


def is_repository(location: str) -> bool:
    """Whether a location reads OWNER/REPO."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.safetensors)", location) is not None


def fetch_tokenizer_folder(repository: str) -> Path:
    """The folder in the cache of a repository OWNER/REPO that holds a tokenizer as `save_pretrained` wrote it.

    Raises FileNotFoundError: no such repository, none that holds one, or the Hub cannot be reached.
    """
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_FOLDER_FILES))
    except Exception as error:  # as in HubFile.fetch
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"no model at {repository}: there is no such folder here, nor on the Hub ({reason})."
        ) from error
    if not any((folder / place / "config.json").is_file() for place in (".", "autoencoder")):
        raise FileNotFoundError(
            f"no model at {repository}: that repository holds no folder of save_pretrained. Of official files, name "
            f"one: {repository}/FILE.safetensors."
        )
    return folder
