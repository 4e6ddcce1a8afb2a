"""Passwords and signed queries in addresses: they can be used, but are never written to files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data_pipeline.common import object_store, store_credentials
from data_pipeline.common.addresses import has_userinfo, without_secrets
from data_pipeline.common.config import from_mapping, to_mapping
from data_pipeline.common.errors import ConfigError, DataError, StorageError
from data_pipeline.common.problems import check_sections
from data_pipeline.common.yaml_file import load_yaml
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.ledger_metadata import LedgerMetadata, LedgerPhase
from data_pipeline.loading.sources import open_sources
from data_pipeline.order.state import LoaderState
from data_pipeline.settings import DataConfig, SourceConfig
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import load_manifest, write_manifest
from pretrain.config.batch import plan_batch
from pretrain.config.presets import load_run
from pretrain.config.schema import EvalSet
from pretrain.evaluate.command import named_sets
from pretrain.train.run_folder import write_run_files
from tests.support.http_server import http_server
from tests.support.small_shards import make_shards

SIGNED = "https://host/data/manifest.json?X-Amz-Signature=SECRET"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (SIGNED, "https://host/data/manifest.json"),
        ("https://me:SECRET@host/a@b", "https://host/a@b"),
        ("s3://me:SECRET@bucket/x-??.tar", "s3://bucket/x-??.tar"),
        ("@http://me:SECRET@h/list?a=SECRET", "@http://h/list"),
        ("{http://me:SECRET@h/a,http://you:SECRET@h/b}", "{http://h/a,http://h/b}"),
        ("s3://b/a@b?.tar", "s3://b/a@b?.tar"),
        ("/data/a@b/c?.tar", "/data/a@b/c?.tar"),
    ],
)
def test_without_secrets(address: str, expected: str) -> None:
    assert without_secrets(address) == expected
    assert has_userinfo(address) == ("SECRET@" in address)


@pytest.mark.parametrize(
    "given",
    [
        {"weight": -1.0},
        {"repeats": 0},
        {"weight": 1.0, "weight_schedule": ((0, 1.0),)},
        {"repeats": 2, "weight": 1.0},
    ],
)
def test_errors_of_a_source_do_not_quote_its_query(given: dict[str, Any]) -> None:
    (problem,) = SourceConfig(shards=SIGNED, **given).problems()
    assert "https://host/data/manifest.json" in problem
    assert "SECRET" not in problem


def test_settings_with_a_password_are_rejected() -> None:
    address = "https://me:SECRET@host/data"
    for section in (
        SourceConfig(shards=address),
        SourceConfig(shards="d", drop=address),
        DataConfig(train=(address,)),
        DataConfig(train=(SourceConfig(shards=address),)),
        EvalSet(name="e", shards=address),
    ):
        with pytest.raises(
            ConfigError, match=r"https://host/data .*netrc.*AWS_SECRET_ACCESS_KEY"
        ) as error:
            check_sections(section)
        assert "SECRET@" not in str(error.value) and "me:" not in str(error.value)


def test_passwords_are_rejected_before_anything_is_read() -> None:
    address = "https://me:SECRET@host.invalid/data"
    for read in (
        lambda: open_sources([SourceConfig(shards=address)]),
        lambda: named_sets([address]),
    ):
        with pytest.raises(ConfigError, match=r"https://host\.invalid/data .*netrc") as error:
            read()
        assert "SECRET@" not in str(error.value)


def test_manifests_contain_no_password(tmp_path: Path) -> None:
    make_shards(tmp_path / "data", count=14)
    with http_server(tmp_path / "data", password="me:SECRET") as web:
        address = web.url("shard-000000.tar").replace("://", "://me:SECRET@")
        (tmp_path / "list").write_text(f"{address}\n")
        for pattern in (address, f"@{tmp_path / 'list'}"):
            with pytest.raises(DataError, match=r"must not be in a manifest.*netrc") as error:
                index_shards([pattern], str(tmp_path / "out"))
            assert "SECRET@" not in str(error.value)
    entries = load_manifest(tmp_path / "data").shards
    for base in ("https://me:SECRET@host/data", "https://host/data?sig=SECRET"):
        with pytest.raises(DataError, match="must not be in a manifest") as error:
            write_manifest(tmp_path / "other", entries, base=base)
        assert "SECRET" not in str(error.value).replace("AWS_SECRET", "")
    assert (
        not (tmp_path / "other" / "manifest.json").exists()
        and not (tmp_path / "out" / "manifest.json").exists()
    )


def test_password_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "data", count=14)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    with http_server(tmp_path / "data", password="me:SECRET") as web:
        netrc.write_text("default login you password other\n")
        object_store.clear_clients()
        with pytest.raises(StorageError):
            load_manifest(web.url())
        netrc.write_text("machine 127.0.0.1 login me password SECRET\n")
        object_store.clear_clients()
        manifest = index_shards(
            [web.url(f"shard-00000{number}.tar") for number in range(2)], str(tmp_path / "out")
        )
        assert manifest.total_samples == 14 and manifest.base == web.url()
    netrc.write_text("machine 127.0.0.1 SECRET\n")
    with pytest.raises(StorageError, match="is not a valid netrc file") as error:
        store_credentials.http_settings("127.0.0.1:80")
    assert "SECRET" not in str(error.value)


def test_run_folder_contains_no_signature(tmp_path: Path) -> None:
    run = load_run(
        "tiny", [f"data.train=['{SIGNED}']", f"eval.sets=[{{name: e, shards: '{SIGNED}'}}]"]
    )
    run = replace(
        run,
        data=replace(run.data, train=(*run.data.train, SourceConfig(shards=SIGNED, drop=SIGNED))),
    )
    tokenizer = cast(Tokenizer, SimpleNamespace(model_bytes=b""))
    plan = plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, 1)
    write_run_files(run, tmp_path, tokenizer, plan)
    text = (tmp_path / "config.yaml").read_text()
    assert "SECRET" not in text and text.count("https://host/data/manifest.json") == 4


def test_signatures_for_several_phases() -> None:
    """In the last phase by position, in earlier ones only for addresses that they have."""
    data, drops = "https://h/data", ("https://h/a.json", "https://h/b.json")
    old = tuple(SourceConfig(shards=data, drop=drop) for drop in drops)
    phases = [
        LedgerPhase(begin=0, data="x"),
        phase_of(4, SourceConfig(shards=data), SourceConfig(shards="https://h/other")),
        phase_of(8, SourceConfig(shards=data, drop="/own.json"), old[1]),
        phase_of(9, *old),
    ]
    given = [SourceConfig(shards=f"{data}?{n}", drop=f"{drops[n]}?{n}") for n in range(2)]
    metadata = LedgerMetadata(seed=1, phases=tuple(phases)).with_addresses(given)
    assert metadata.phases[0] == phases[0]
    second, third, last = ([(s.shards, s.drop) for s in p.sources] for p in metadata.phases[1:])
    assert last == [(f"{data}?0", f"{drops[0]}?0"), (f"{data}?1", f"{drops[1]}?1")]
    assert metadata.phases[3].manifests == (f"{data}?0", f"{data}?1")
    assert second == [(f"{data}?1", ""), ("https://h/other", "")]
    assert third == [(f"{data}?1", "/own.json"), (f"{data}?1", f"{drops[1]}?1")]


def phase_of(begin: int, *sources: SourceConfig) -> LedgerPhase:
    manifests = tuple(source.shards for source in sources)
    return LedgerPhase(begin=begin, data="x", manifests=manifests, sources=sources)


def test_ledger_contains_no_signature(tmp_path: Path) -> None:
    make_shards(tmp_path / "data", count=14)
    with http_server(tmp_path / "data", query="sig=SECRET") as web:
        # Signed for the manifest alone, as a presigned address is.
        signed, plain = f"{web.url('manifest.json')}?sig=SECRET", str(tmp_path / "data")
        given = (SourceConfig(shards=signed), SourceConfig(shards=plain))
        sources = open_sources(given)
        LedgerMetadata.of(sources, 4, LoaderState()).write(tmp_path)
        text = (tmp_path / "ledger.json").read_text()
        assert "SECRET" not in text
        metadata = LedgerMetadata.read(tmp_path)
        (phase,) = metadata.phases
        assert phase.sources[1] == given[1] and phase.manifests[1] == str(tmp_path / "data")
        with pytest.raises(StorageError):
            open_sources(phase.sources)
        (tmp_path / "run.yaml").write_text(
            json.dumps({"data": {"train": [to_mapping(entry) for entry in given]}})
        )
        section = load_yaml(tmp_path / "run.yaml")["data"]
        new = from_mapping(DataConfig, {"train": section["train"]}).sources
        (completed,) = metadata.with_addresses(new).phases
        assert completed.sources == given and completed.manifests == (
            given[0].shards,
            str(tmp_path / "data"),
        )
        with pytest.raises(ConfigError, match=r"ledger: http://127\.") as error:
            metadata.with_addresses(given[:1])
        assert "SECRET" not in str(error.value)
