"""`offramp dlq` against a real server."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from redis import Redis
from typer.testing import CliRunner

from service import cli
from service.broker.letters import new_id
from service.broker.redis_streams import Broker
from service.protocol import ClassifyJob, Terms
from tests.service.broker.jobs import LONG, job


@pytest.fixture
def server_url(valkey_url):
    """A database that other tests leave no letters in."""
    url = f"{valkey_url}?db=1"
    yield url
    with Redis.from_url(url) as redis:
        redis.flushdb()


@pytest.fixture
def dlq(server_url, monkeypatch, capsys):
    """Run `offramp dlq ...`; (exit status, what it printed, what it complained of)."""
    monkeypatch.setenv("OFFRAMP_REDIS_URL", server_url)

    def run(*args):
        monkeypatch.setattr("sys.argv", ["offramp", "dlq", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        if isinstance(stopped.value.code, str):
            return 1, shown.out, stopped.value.code
        return stopped.value.code or 0, shown.out, shown.err

    return run


def on_server(url, work):
    async def connected():
        broker = Broker(url)
        try:
            return await work(broker)
        finally:
            await broker.aclose()

    return asyncio.run(connected())


@pytest.fixture
def buried(server_url):
    """Three dead jobs of two models, as (model, id)."""
    models = [f"a-{uuid4().hex[:8]}", f"b.{uuid4().hex[:8]}"]
    sent = [(model, new_id(model)) for model in (models[0], models[0], models[1])]

    async def bury(broker):
        for model, name in sent:
            await broker.ensure(model)
            made = ClassifyJob(id=name, cost=7, work=job(model, 2).work)
            await broker.submit(made, Terms(2, 30_000, 1000, priority="high", owner="k"))
        for _ in range(2):
            for model in models:
                await broker.take(model, "w1", 9, 9, 0, max_deliveries=1)

    on_server(server_url, bury)
    return sent


def test_ls_is_a_table_over_all_models(dlq, buried):
    status, shown, _ = dlq("ls")
    assert status == 0
    head, *lines = shown.splitlines()
    assert head.split() == ["id", "model", "age", "attempts", "worker", "error"]
    cells = [line.split(None, 5) for line in lines]
    assert [(line[1], line[0]) for line in cells] == buried
    assert [line[3:] for line in cells] == [["1", "w1", "worker w1 went silent in delivery 1"]] * 3
    assert all(line[2].endswith("s") for line in cells)


def test_ls_of_one_model_and_of_none(dlq, buried):
    _, shown, _ = dlq("ls", "--model", buried[2][0])
    assert [line.split()[0] for line in shown.splitlines()[1:]] == [buried[2][1]]
    assert dlq("ls", "--model", "nobody") == (0, "no dead letters\n", "")


def test_show_tells_the_work_but_not_its_bytes(dlq, buried):
    model, name = buried[2]
    status, shown, _ = dlq("show", name)
    told = dict(line.split(None, 1) for line in shown.splitlines())
    assert status == 0
    assert told["id"] == name
    assert (told["model"], told["priority"], told["owner"], told["rows"], told["cost"]) == (
        model,
        "high",
        "k",
        "2",
        "7",
    )
    assert (told["work.images"], told["work.method"]) == ("<1 bytes>, <1 bytes>", "single")
    assert told["error"] == "worker w1 went silent in delivery 1"
    assert told["died"].endswith("Z")


def test_replay_queues_the_same_work_under_a_new_id(dlq, buried, server_url, monkeypatch):
    monkeypatch.setenv("OFFRAMP_DEADLINE_S", "50")
    model, name = buried[0]
    status, shown, _ = dlq("replay", name)
    assert status == 0
    old, arrow, new = shown.splitlines()[0].split()
    assert (old, arrow) == (name, "->")
    assert new.startswith(f"{model}.")
    assert shown.splitlines()[1] == "replayed 1"

    async def look(broker):
        found = await broker.take(model, "w", 9, 9, LONG)
        return found.deliveries, await broker.letter(model, name), await broker.status(model, new)

    [delivery], letter, status = on_server(server_url, look)
    assert (delivery.job.id, delivery.job.cost, delivery.deliveries) == (new, 7, 1)
    assert delivery.entry.startswith("high:")
    assert delivery.deadline_ms - delivery.submitted_ms == 50_000
    assert letter is None
    assert status.owner == "k"
    assert dlq("replay", name)[0] == 1


def test_replay_of_all(dlq, buried):
    status, shown, _ = dlq("replay", "--all")
    assert (status, shown.splitlines()[-1]) == (0, "replayed 3")
    assert dlq("ls") == (0, "no dead letters\n", "")


def test_a_letter_stays_when_the_queue_refuses_its_job(dlq, buried, monkeypatch):
    monkeypatch.setenv("OFFRAMP_MAX_BACKLOG", "8")
    model = buried[0][0]
    status, shown, error = dlq("replay", "--all", "--model", model)
    assert status == 1
    assert len(shown.splitlines()) == 1
    assert "backlog of 7 of 8" in error
    assert buried[1][1] in dlq("ls")[1]


def test_purge(dlq, buried):
    assert dlq("purge", buried[0][1])[:2] == (0, "purged 1\n")
    assert dlq("purge", "--all", "--model", buried[1][0])[:2] == (0, "purged 1\n")
    assert dlq("purge", "--all")[:2] == (0, "purged 1\n")
    assert dlq("ls") == (0, "no dead letters\n", "")


@pytest.mark.parametrize("command", ["show", "replay", "purge"])
def test_an_unknown_id_is_told(dlq, command):
    status, _, error = dlq(command, "m.unheard-of")
    assert status == 1
    assert error == "offramp: no dead letter 'm.unheard-of'; `offramp dlq ls` lists them"


@pytest.mark.parametrize("args", [("replay",), ("purge",), ("purge", "x", "--all"), ("show",)])
def test_what_to_do_it_to_must_be_said(dlq, args):
    assert dlq(*args)[0] == 2


def test_no_server_is_told(dlq, monkeypatch):
    monkeypatch.setenv("OFFRAMP_REDIS_URL", "unix:///nonexistent/valkey.sock")
    status, _, error = dlq("ls")
    assert status == 1
    assert "Redis does not answer" in error


def test_help_names_the_commands():
    shown = CliRunner().invoke(cli.app, ["dlq", "--help"]).output
    assert all(command in shown for command in ("ls", "show", "replay", "purge"))
