"""Credentials: settings of obstore's clients from the usual files and environment variables.

- s3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`; else the profile
  `AWS_PROFILE` (or `default`) of `~/.aws/credentials` and `~/.aws/config`; else web identity or the
  machine's role, which obstore requests. Profiles with SSO, a `credential_process` or a
  `source_profile` are left to botocore. `AWS_REGION`, and `AWS_ENDPOINT_URL_S3` or
  `AWS_ENDPOINT_URL` for stores other than Amazon's.
- gs: `GOOGLE_APPLICATION_CREDENTIALS`, the file of `gcloud auth application-default login`, or the
  machine's service account. Files of other types are left to google-auth.
  `STORAGE_EMULATOR_HOST` for a server without authentication.
- az: `AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY` or `AZURE_STORAGE_SAS_TOKEN`, or
  `AZURE_STORAGE_CONNECTION_STRING`; else a client secret, workload identity or, if
  `AZURE_USE_AZURE_CLI` is true, `az login`, which obstore uses; else azure-identity, if
  `AZURE_TOKEN_CREDENTIALS` is set; else the machine's identity. `AZURE_STORAGE_ENDPOINT` for
  another server.
- http(s): user and password in the address, or those of the host in `~/.netrc` or the file that
  `NETRC` names.

Values read here are never part of a message or a log.
"""

from __future__ import annotations

import base64
import configparser
import json
import netrc
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.common.errors import StorageError
from data_pipeline.common.store_errors import ErrorKind

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
_BOTOCORE_KEYS = (
    "credential_process",
    "credential_source",
    "sso_session",
    "sso_start_url",
    "source_profile",
)
_GOOGLE_TYPES = ("service_account", "authorized_user")
"""The types of credential files that obstore reads."""
_AZURE_VARIABLES = (
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY"),
    *("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_TOKEN"),
    *("AZURE_CLIENT_SECRET", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_USE_AZURE_CLI"),
)
"""Each of these gives obstore credentials."""

LIBRARY_SOURCE = "library_source"
"""Not a setting of obstore: the name that `store_providers.make_provider` needs, if the credentials
come from a library."""


def s3_settings(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings of an s3 client.

    Raises:
        StorageError: `AWS_PROFILE` is not the name of a profile, or a file is invalid.
    """
    profile = _profile(env)
    if env.get("AWS_ACCESS_KEY_ID"):  # obstore reads the other variables itself
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
    """Settings of a gs client; obstore reads the usual credentials itself."""
    host = env.get("STORAGE_EMULATOR_HOST", "")
    if not host:
        file = _google_file(env)
        return {LIBRARY_SOURCE: file} if file else {}
    # A dummy token: without one obstore looks for an account before it writes.
    return {"base_url": host if "://" in host else f"http://{host}", "bearer_token": "anonymous"}


def _google_file(env: Mapping[str, str]) -> str:
    """The file of Google's credentials, if it exists and obstore does not know its type."""
    if any(name.startswith("GOOGLE_SERVICE_ACCOUNT") and env[name] for name in env):
        return ""
    path = env.get("GOOGLE_APPLICATION_CREDENTIALS") or (
        f"{env.get('HOME', '~')}/.config/gcloud/application_default_credentials.json"
    )
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""  # obstore reports it
    known = not isinstance(content, dict) or content.get("type", "") in ("", *_GOOGLE_TYPES)
    return "" if known else path


def az_settings(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings of an az client; obstore reads the other usual credentials itself."""
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
    settings = {names[name]: value for name, value in given.items() if name in names}
    for name in ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"):
        if env.get(name):
            settings["endpoint"] = env[name]
    if sas := env.get("AZURE_STORAGE_SAS_TOKEN"):
        settings["sas_key"] = sas.removeprefix("?")
    kind = env.get("AZURE_TOKEN_CREDENTIALS")
    has_keys = "account_key" in settings or "sas_key" in settings
    if kind and not has_keys and not any(env.get(name) for name in _AZURE_VARIABLES):
        settings[LIBRARY_SOURCE] = kind
    return settings


def http_settings(
    authority: str, env: Mapping[str, str] = os.environ
) -> tuple[str, dict[str, str]]:
    """Host and port of `user:password@host:port`, and the headers for authentication.

    Raises:
        StorageError: The netrc file is invalid.
    """
    userinfo, at, host = authority.rpartition("@")
    userinfo = urllib.parse.unquote(userinfo) if at else _from_netrc(host, env)
    if not userinfo:
        return host, {}
    return host, {"Authorization": "Basic " + base64.b64encode(userinfo.encode()).decode()}


def _from_netrc(host: str, env: Mapping[str, str]) -> str:
    """`user:password` of a host; empty if there is no netrc file or it does not list the host."""
    path = Path(env.get("NETRC") or f"{env.get('HOME', '~')}/.netrc").expanduser()
    try:
        hosts = netrc.netrc(str(path)).hosts
    except (OSError, UnicodeDecodeError):
        return ""
    except netrc.NetrcParseError:
        # No cause: the message of netrc quotes the line, which may contain a password.
        raise StorageError(f"{path} is not a valid netrc file", kind=ErrorKind.REFUSED) from None
    # Only for a listed host: `default` would send a password to every server that has shards.
    entry = hosts.get(urllib.parse.urlsplit(f"//{host}").hostname or "")
    return f"{entry[0]}:{entry[2] or ''}" if entry and host != "default" else ""


def _profile(env: Mapping[str, str]) -> dict[str, str]:
    """The settings of the selected AWS profile, under obstore's names."""
    selected = env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE") or ""
    name, home = selected or "default", env.get("HOME", "~")
    config = _read_ini(env.get("AWS_CONFIG_FILE") or f"{home}/.aws/config")
    keys = _read_ini(env.get("AWS_SHARED_CREDENTIALS_FILE") or f"{home}/.aws/credentials")

    settings = config.get(f"profile {name}") or (config.get(name) if name == "default" else None)
    if selected and settings is None and name not in keys:
        profiles = sorted({*keys, *(section.removeprefix("profile ") for section in config)})
        raise StorageError(
            f"AWS_PROFILE is {selected!r}, but the profiles in ~/.aws/credentials and "
            f"~/.aws/config are: {', '.join(profiles) or 'none'}",
            kind=ErrorKind.REFUSED,
        )

    values = (settings or {}) | keys.get(name, {})
    has_keys = "aws_access_key_id" in values or env.get("AWS_ACCESS_KEY_ID")
    if selected and not has_keys and any(key in values for key in _BOTOCORE_KEYS):
        kept = {"region": values.get("region"), "endpoint": values.get("endpoint_url")}
        return {LIBRARY_SOURCE: name} | {key: value for key, value in kept.items() if value}
    return {_PROFILE_KEYS[key]: value for key, value in values.items() if key in _PROFILE_KEYS}


def _read_ini(path: str) -> dict[str, dict[str, str]]:
    """Sections of an INI file; empty if it does not exist or cannot be read."""
    # No interpolation: a key may contain `%`. `default_section` is disabled because `[default]` is
    # an ordinary section in AWS files.
    parser = configparser.RawConfigParser(default_section="", strict=False, allow_no_value=True)
    try:
        parser.read_string(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}
    except configparser.Error:
        # No cause: the message of configparser quotes the line, which may be a key.
        raise StorageError(
            f"{path} is not a valid AWS profile file", kind=ErrorKind.REFUSED
        ) from None
    return {
        name: {key: value or "" for key, value in parser.items(name)} for name in parser.sections()
    }
