"""Rows as files hold them: what is read, what is refused and why, and the OpenAI batch format."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.batch.openai_rows import error_line, prompt_of_request, response
from runtime.batch.places import Place
from runtime.batch.rows import Answer, BadRow, Location, prompt_of
from runtime.batch.sources import format_of, read_rows
from runtime.batch.spool import Spool
from runtime.batch.targets import Columns, write_rows
from runtime.engine.request import SamplingParams
from runtime.errors import DataError, InvalidInputError

GREEDY = {"max_tokens": 8, "temperature": 0.0}


def read(path: Path, kind: Any) -> list[Any]:
    return list(read_rows(Place(str(path)), kind))


def test_a_format_is_what_was_asked_for_or_what_the_name_says() -> None:
    assert format_of("s3://bucket/a.csv", None) == "csv"
    assert format_of("a.PARQUET", None) == "parquet"
    assert format_of("a.jsonl", "openai") == "openai"
    with pytest.raises(InvalidInputError, match="format='xml': is one of jsonl, csv, parquet, openai"):
        format_of("a.jsonl", "xml")
    with pytest.raises(InvalidInputError, match="ends in none of"):
        format_of("a.txt", None)


def test_csv_gives_text_and_numbers_and_names_the_line_of_what_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfinput,task,max_tokens\n"two\nlines",red,3\nplain,,\nx,y\nx,y,many\nbad\xff,,\n')
    good, empty, short, many, undecodable = read(path, "csv")
    assert good == (3, {"input": "two\nlines", "task": "red", "max_tokens": 3})
    assert empty == (4, {"input": "plain", "task": None, "max_tokens": None})
    assert (short.line, short.field, "has 2 cells, the header has 3" in short.problem) == (5, "line", True)
    assert (many.line, many.field) == (6, "max_tokens")
    assert (undecodable.line, undecodable.field, "not UTF-8" in undecodable.problem) == (7, "input", True)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.csv", b"input,input\nx,y\n", "two columns"),
        ("a.csv", b'input\n"x" y\n', "is not CSV"),
        ("a.parquet", b"PAR1 not really", "is not Parquet"),
    ],
)
def test_a_file_that_is_not_of_its_format_is_refused_as_a_whole(
    name: str, data: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=problem):
        read(tmp_path / name, name.split(".")[1])


def test_parquet_keeps_what_json_cannot_say(tmp_path: Path) -> None:
    when = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
    row = {"input": "x", "when": when, "data": b"\x00\x01", "list": [1, 2]}
    pq.write_table(pa.Table.from_pylist([row, {"input": "y"}]), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", "parquet")
    assert rows[0] == (1, row)
    columns = Columns("parquet")
    for _, content in rows:
        columns.add(content)
    answered = [{**content, "answer": "a", "routing": None, "usage": None} for _, content in rows]
    write_rows(Place(str(tmp_path / "b.parquet")), "parquet", answered, columns)
    table = pq.read_table(tmp_path / "b.parquet")
    assert table.to_pylist()[0]["when"] == when
    assert table.column_names == ["input", "when", "data", "list", "answer", "routing", "usage"]
    write_rows(Place(str(tmp_path / "b.jsonl")), "jsonl", answered, Columns("jsonl"))
    text = json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])
    assert (text["when"], text["data"]) == ("2026-05-01T12:00:00+00:00", "AAE=")


def test_all_parts_have_one_schema_even_if_a_field_is_rare_or_sometimes_empty(tmp_path: Path) -> None:
    columns = Columns("parquet")
    rows: list[dict[str, Any]] = [{"input": "x", "n": None}] * 1500 + [
        {"input": "y", "n": 1},
        {"input": "z", "rare": 1.5},
    ]
    for row in rows:
        columns.add(row)
    for name, part in (("a", rows[:2]), ("b", rows[-2:])):
        write_rows(Place(str(tmp_path / f"{name}.parquet")), "parquet", part, columns)
    schemas = [pq.read_schema(tmp_path / f"{name}.parquet") for name in "ab"]
    assert schemas[0] == schemas[1]
    assert str(schemas[0].field("n").type) == "int64"


def test_rows_that_fit_into_no_one_table_are_refused() -> None:
    columns = Columns("parquet")
    columns.add({"input": "x", "n": 1})
    columns.add({"input": "x", "n": "one"})
    with pytest.raises(DataError, match="fit into no one table"):
        _ = columns.schema


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": "x", "task": 5}, "task"),
        ({"input": "x", "max_tokens": True}, "max_tokens"),
        ({"input": "x", "max_tokens": 0}, "max_tokens"),
        ({"input": "x", "usage": 1}, "usage"),
    ],
)
def test_a_bad_row_names_its_field(content: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        prompt_of(7, content, GREEDY)
    assert BadRow.of(7, caught.value).field == field


def test_a_row_that_samples_gets_a_seed_of_its_own() -> None:
    hot = {"max_tokens": 8, "temperature": 1.0}
    assert prompt_of(7, {"input": "x"}, hot).sampling.seed == 7
    assert prompt_of(7, {"input": "x"}, {**hot, "seed": 100}).sampling.seed == 107
    assert prompt_of(7, {"input": "x"}, GREEDY).sampling.seed is None


def request(**body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    fields = {"model": "red", "messages": messages, **body}
    return {"custom_id": "mine-1", "method": "POST", "url": "/v1/chat/completions", "body": fields}


def test_an_openai_request_becomes_a_prompt() -> None:
    prompt = prompt_of_request(3, request(max_completion_tokens=5, stop="."), GREEDY)
    assert (prompt.text, prompt.task, prompt.line) == ("Hello", "red", 3)
    assert prompt.sampling == SamplingParams(max_tokens=5, stop=(".",))
    assert prompt_of_request(3, request(model="greenroom"), GREEDY).task is None
    assert prompt_of_request(3, request(model="greenroom:red"), GREEDY).task == "red"
    text = {**request(), "url": "/v1/completions", "body": {"model": "red", "prompt": "Once", "n": 1}}
    assert prompt_of_request(3, text, GREEDY).text == "Once"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({}, "method"),
        ({**request(), "custom_id": ""}, "custom_id"),
        ({**request(), "method": "GET"}, "method"),
        ({**request(), "url": "/v1/embeddings"}, "url"),
        ({**request(), "body": []}, "body"),
        (request(n=2), "body.n"),
        (request(stream=True), "body.stream"),
        (request(logit_bias={}), "body.logit_bias"),
        (request(model=None), "body.model"),
        (request(messages=[]), "body.messages"),
        (request(messages=[{"role": "system", "content": "x"}]), "body.messages[0].role"),
        (request(messages=[{"role": "user", "content": ["x"]}]), "body.messages[0].content"),
        (request(temperature="hot"), "body.temperature"),
        (request(stop=[1]), "body.stop"),
        ({**request(), "url": "/v1/completions", "body": {"model": "red", "prompt": ["a"]}}, "body.prompt"),
    ],
)
def test_a_bad_openai_request_names_its_field(content: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        prompt_of_request(3, {**({"custom_id": "a"} if not content else {}), **content}, GREEDY)
    assert caught.value.field == field


def test_openai_answers_and_errors_have_the_shape_that_its_clients_read() -> None:
    location = Location(line=3, task="red", how="located", margin=0.5)
    answer = Answer(line=3, text="Hi", prompt_tokens=2, completion_tokens=1, finish_reason="stop")
    line = response(request(), location, answer, 4)
    assert (line["custom_id"], line["error"], line["response"]["status_code"]) == ("mine-1", None, 200)
    body = line["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hi"}
    assert (body["model"], body["object"], body["usage"]["total_tokens"]) == ("red", "chat.completion", 3)
    text = response({**request(), "url": "/v1/completions"}, location, answer, 4)["response"]["body"]
    assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "Hi")
    bad = BadRow(line=3, field="body.n", reason="INVALID_FIELD", problem="no")
    failed = error_line(bad, request())
    assert (failed["custom_id"], failed["response"]) == ("mine-1", None)
    assert failed["error"] == {"code": "INVALID_FIELD", "message": "no", "param": "body.n", "line": 3}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "a" / "file"))
    with pytest.raises(TypeError), place.replacing() as file:
        file.writelines([b"half", "no bytes"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    place.write(b"whole")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    assert (place.read(), place.parent_exists, place.is_local) == (b"whole", True, True)


def test_a_name_without_a_file_system_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no file system"):
        Place("nothing-known://x")


def test_the_spool_gives_rows_back_in_any_order() -> None:
    spool = Spool()
    for line in range(5):
        spool.add(line + 10, {"n": line, "data": b"\x00" * line})
    assert [spool[number]["n"] for number in (3, 0, 4)] == [3, 0, 4]
    assert (len(spool), list(spool.lines)) == (5, [10, 11, 12, 13, 14])
    spool.close()
    spool.close()
