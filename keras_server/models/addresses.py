"""Models at an address: https://..., downloaded once into the cache folder, and hf://OWNER/NAME, as Keras loads it."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import ipaddress
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from keras_server.models.errors import StartupError
from keras_server.models.export import digest, is_trusted, plain, version
from keras_server.models.kinds import find_model

PATIENCE = 30  # seconds for a connection, and between two pieces of a download
PIECE = 2**20  # bytes


def fetch(model: str, sha256: str, cache_dir: str) -> str:
    """Return where the model lies on this machine that --model names, downloaded if it is an address.

    Raises StartupError, also where a file has another checksum than `sha256`, unless that is empty.
    """
    scheme, found, _ = model.partition("://")
    if scheme == "hf" and found:
        if sha256:
            raise StartupError("--sha256 is for a file: hf:// names a whole repository.")
        return str(from_hub(model, cache_dir))
    if scheme in ("https", "http") and found:
        return str(from_web(model, sha256, cache_dir))
    if found and scheme.isalnum():
        raise StartupError(f"{scheme}:// is no address that is read, as https:// and hf:// are: copy the model here.")
    if sha256:
        if not Path(model).is_file():
            raise StartupError("--sha256 is for a file or an https:// address that --model names.")
        check_sum(model, digest(Path(model)), sha256)
    return model


def check_sum(model: str, actual: str, wanted: str) -> None:
    """Raise StartupError where a file has another checksum than it should."""
    if wanted and actual != wanted.lower():
        raise StartupError(f"{model} has the SHA-256 {actual}, and not the one that --sha256 says: it is another file.")


def place_for(address: str, cache_dir: str) -> Path:
    """Return the folder that a download is kept in, which only this user can have written to.

    Without a cache folder it goes when the process ends.
    """
    if cache_dir:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: ~ stands for no folder
            downloads = Path(cache_dir).expanduser() / "downloads"
            folder = downloads / hashlib.sha256(address.encode()).hexdigest()[:32]
            folder.mkdir(0o700, parents=True, exist_ok=True)
            if all(map(is_trusted, (downloads.parent, downloads, folder))):
                return folder
    temporary = tempfile.mkdtemp(prefix="keras-server-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def from_web(address: str, sha256: str, cache_dir: str) -> Path:
    """Return the file at an https:// address, downloaded unless it is kept already. Raises StartupError."""
    check_secure(address)
    folder = place_for(address, cache_dir)
    file = folder / (plain(unquote(urlsplit(address).path.rpartition("/")[2])).lstrip(".") or "model")
    if file.is_file() and (not sha256 or digest(file) == sha256.lower()):
        return file
    print(f"Downloading {address}", file=sys.stderr, flush=True)
    try:
        # Of a download that was cut off nothing stays.
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            part = Path(unfinished, file.name)
            with part.open("wb") as out:
                check_sum(address, download(address, out), sha256)
            try:
                find_model(part)
            except StartupError as error:
                raise StartupError(str(error).replace(str(part), address)) from None
            part.replace(file)
    except OSError as error:
        raise StartupError(f"{address} cannot be kept in {folder} ({error.strerror or error}).") from None
    return file


def check_secure(address: str) -> None:
    """Raise StartupError for http://, where anybody on the way may put another model, except on this machine."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if not host:
        raise StartupError(f"{address} names no server.")
    if parts.scheme == "https" or host == "localhost":
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    raise StartupError(f"{address}: what comes over http:// may be anybody's: take https://.")


def download(address: str, out: IO[bytes]) -> str:
    """Write what is at an address to a file, and return its SHA-256. Raises StartupError, or OSError of the file."""
    import requests

    checksum = hashlib.sha256()
    try:
        # What a server packs for the way would have another length, and another checksum.
        headers = {"Accept-Encoding": "identity"}
        with requests.get(address, stream=True, timeout=PATIENCE, headers=headers) as response:
            check_secure(response.url)
            if response.status_code != 200:
                status = f"{response.status_code} {response.reason}".strip()
                raise StartupError(f"{address} cannot be downloaded: its server answered {status}.")
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                for piece in response.iter_content(PIECE):
                    out.write(piece)
                    checksum.update(piece)
                    bar.update(len(piece))
    except requests.RequestException as error:
        raise StartupError(f"{address} cannot be downloaded: {reason_of(error)}.") from None
    return checksum.hexdigest()


def reason_of(error: Exception) -> str:
    """Return why a request failed, in a few words, out of the sentence that requests wraps them in."""
    text = str(error)
    if "timed out" in text:
        return "its server does not answer"
    if "Failed to resolve" in text or "Name or service not known" in text:
        return "no such server is known, or there is no network"
    if match := re.search(r"\[Errno -?\d+\] ([^'\")]+)", text):
        return match[1].strip()
    if "IncompleteRead" in text:
        return "the connection broke off"
    return text.rstrip(".")[:200] or type(error).__name__


def from_hub(address: str, cache_dir: str) -> Path:
    """Return the folder of a model of Hugging Face's, which Keras' own loader would take. Raises StartupError.

    The files are kept, and looked after, by the package of Hugging Face's makers; here a link bears the model's name.
    """
    if not (match := re.fullmatch(r"hf://([\w.-]+/([\w.-]+))", address)):
        raise StartupError(f"{address} is no address of a model: write hf://OWNER/NAME.")
    try:
        import huggingface_hub
    except ImportError:
        raise StartupError(f"{address} needs the package huggingface_hub: pip install huggingface_hub.") from None
    try:
        found: Any = huggingface_hub.snapshot_download(
            repo_id=match[1], library_name="keras", library_version=version("keras")
        )
    except Exception as error:  # noqa: BLE001 - it raises its own and those of several libraries
        raise StartupError(f"{address} cannot be downloaded: {reason_of(error)}.") from None
    link = place_for(address, cache_dir) / match[2]
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(Path(found).resolve(), target_is_directory=True)
    except OSError as error:
        raise StartupError(f"{address} cannot be kept in {link.parent} ({error.strerror or error}).") from None
    return link
