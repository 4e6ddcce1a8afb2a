"""Who we are to a store: the settings of obstore's clients, from the places where people keep them.

- s3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`; else the profile `AWS_PROFILE` (or
  `default`) of `~/.aws/credentials` and `~/.aws/config`; else web identity or the machine's role,
  which the library asks for. `AWS_REGION`, and `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` for
  other stores than Amazon's.
- gs: `GOOGLE_APPLICATION_CREDENTIALS`, what `gcloud auth application-default login` left, or the machine's
  account; `STORAGE_EMULATOR_HOST` for a server that asks for none.
- az: `AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY` or `AZURE_STORAGE_SAS_TOKEN`, or
  `AZURE_STORAGE_CONNECTION_STRING`; `AZURE_STORAGE_ENDPOINT` for another server.
- http(s): user and password in the address, or the host's in `~/.netrc` or the file that `NETRC` names.

What is read here never enters a message or a log.
"""

from __future__ import annotations

import base64
import configparser
import netrc
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_errors import Kind

_PROFILE_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
    "role_arn": "role_arn",
    "web_identity_token_file": "web_identity_token_file",
    "role_session_name": "role_session_name",
}
_NOT_READ = ("credential_process", "sso_session", "sso_start_url", "source_profile")


def s3_settings(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings of a client for s3.

    Raises:
        StorageError: `AWS_PROFILE` names no profile, or one that needs a program to be run.
    """
    profile = _profile(env)
    if env.get("AWS_ACCESS_KEY_ID"):  # and the library reads the rest of these itself
        for name in (
            "access_key_id",
            "secret_access_key",
            "session_token",
            "role_arn",
            "web_identity_token_file",
        ):
            profile.pop(name, None)
    endpoint = (
        env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or profile.get("endpoint")
    )
    region = (
        env.get("AWS_REGION")
        or env.get("AWS_DEFAULT_REGION")
        or profile.get("region")
        or "us-east-1"
    )
    return profile | {"region": region} | ({"endpoint": endpoint} if endpoint else {})


def gs_settings(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings of a client for gs; the library finds the usual credentials itself."""
    host = env.get("STORAGE_EMULATOR_HOST", "")
    if not host:
        return {}
    # A token that stands for nobody: without one the library looks for an account before it writes.
    return {"base_url": host if "://" in host else f"http://{host}", "bearer_token": "anonymous"}


def az_settings(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings of a client for az; the library finds the other usual credentials itself."""
    parts = (
        part.partition("=")
        for part in env.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";")
        if part
    )
    given = {name: value for name, _, value in parts}
    names = {
        "AccountName": "account_name",
        "AccountKey": "account_key",
        "SharedAccessSignature": "sas_key",
        "BlobEndpoint": "endpoint",
    }
    found = {names[name]: value for name, value in given.items() if name in names}
    for name in ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"):
        if env.get(name):
            found["endpoint"] = env[name]
    if sas := env.get("AZURE_STORAGE_SAS_TOKEN"):
        found["sas_key"] = sas.removeprefix("?")
    return found


def http_settings(
    authority: str, env: Mapping[str, str] = os.environ
) -> tuple[str, dict[str, str]]:
    """Host and port of `user:password@host:port`, and the headers that say who we are.

    Raises:
        StorageError: The netrc file is none.
    """
    who, at, host = authority.rpartition("@")
    who = urllib.parse.unquote(who) if at else _from_netrc(host, env)
    if not who:
        return host, {}
    return host, {"Authorization": "Basic " + base64.b64encode(who.encode()).decode()}


def _from_netrc(host: str, env: Mapping[str, str]) -> str:
    """`user:password` for a host; empty where the file, if there is one, does not name it."""
    path = Path(env.get("NETRC") or f"{env.get('HOME', '~')}/.netrc").expanduser()
    try:
        hosts = netrc.netrc(str(path)).hosts
    except (OSError, UnicodeDecodeError):
        return ""
    except netrc.NetrcParseError:
        # Its text quotes the line, which may be a password.
        raise StorageError(
            f"{path} is not in the form of a netrc file", kind=Kind.REFUSED
        ) from None
    # Only for a host that is named: `default` would send a password to every server that shards
    # come from.
    found = hosts.get(urllib.parse.urlsplit(f"//{host}").hostname or "")
    return f"{found[0]}:{found[2] or ''}" if found and host != "default" else ""


def _profile(env: Mapping[str, str]) -> dict[str, str]:
    """What the chosen profile says, under the library's names."""
    asked = env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE") or ""
    name, home = asked or "default", env.get("HOME", "~")
    config = _ini(env.get("AWS_CONFIG_FILE") or f"{home}/.aws/config")
    keys = _ini(env.get("AWS_SHARED_CREDENTIALS_FILE") or f"{home}/.aws/credentials")
    settings = config.get(f"profile {name}") or (config.get(name) if name == "default" else None)
    if asked and settings is None and name not in keys:
        known = sorted({*keys, *(section.removeprefix("profile ") for section in config)})
        raise StorageError(
            f"AWS_PROFILE is {asked!r}, but ~/.aws/credentials and ~/.aws/config have {', '.join(known) or 'none'}",
            kind=Kind.REFUSED,
        )
    found = (settings or {}) | keys.get(name, {})
    needs = [key for key in _NOT_READ if key in found]
    if asked and needs and "aws_access_key_id" not in found and not env.get("AWS_ACCESS_KEY_ID"):
        raise StorageError(
            f"the AWS profile {name!r} has {needs[0]}, which is not read here; put keys into the environment "
            f"with `aws configure export-credentials --format env`",
            kind=Kind.REFUSED,
        )
    return {_PROFILE_KEYS[key]: value for key, value in found.items() if key in _PROFILE_KEYS}


def _ini(path: str) -> dict[str, dict[str, str]]:
    """Sections of a file; none where it cannot be read, because not everybody has one."""
    # No interpolation: a key may hold `%`. `default_section`: their `[default]` is a section like
    # others.
    parser = configparser.RawConfigParser(default_section="", strict=False, allow_no_value=True)
    try:
        parser.read_string(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    except configparser.Error:
        # Its text quotes the line, which may be a key.
        raise StorageError(
            f"{path} is not in the form of an AWS profile file", kind=Kind.REFUSED
        ) from None
    return {
        name: {key: value or "" for key, value in parser.items(name)} for name in parser.sections()
    }
