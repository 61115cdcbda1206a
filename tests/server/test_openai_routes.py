"""OpenAI's routes, by the real client: the same tokens as the engine's, in OpenAI's shapes."""

import json
import re
import subprocess
from pathlib import Path

import openai
import pytest
from loopback import BASE, TENANTS

MESSAGES = [{"role": "user", "content": "How many rows has the table?"}]


def ids_of(tokenizer, messages=MESSAGES, **options):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def expected(served, prompt, adapter, tokens, **options):
    return served.served.engine.submit(prompt, adapter, max_new_tokens=tokens, **options).result(60)


@pytest.mark.parametrize("name", [BASE, *TENANTS, f"{BASE}:sql"])
def test_a_model_is_an_adapter_or_the_base(client, served, tokenizer, name):
    adapter = None if name == BASE else name.split(":")[-1]
    completion = expected(served, ids_of(tokenizer), adapter, 12)
    answer = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.model == name and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == completion.finish_reason
    assert choice.message.content == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    usage = answer.usage
    assert usage.prompt_tokens == len(ids_of(tokenizer)) and usage.completion_tokens == len(completion.token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_sglangs_way_to_name_an_adapter(client):
    def content(model, **options):
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=0, extra_body=options
        )
        return answer.choices[0].message.content

    assert content(BASE, lora_path="sql") == content("sql") != content(BASE)
    with pytest.raises(openai.NotFoundError):
        content(BASE, lora_path="never")


def test_the_readmes_curl_lines(url):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^curl (?:.*\\\n)*.*", readme, re.MULTILINE)
    assert commands
    for command in commands:
        assert "http://127.0.0.1:8000" in command
        command = command.replace("http://127.0.0.1:8000", url)
        answer = subprocess.run(
            ["bash", "-ec", f"{command} --silent --fail"], capture_output=True, text=True, timeout=60
        )
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_tenants_answer_differently(client):
    answers = {
        name: client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=12, temperature=0)
        .choices[0]
        .message.content
        for name in (BASE, *TENANTS)
    }
    assert len(set(answers.values())) == len(answers)


def test_a_stream_is_the_same_text_in_pieces(client, tokenizer):
    asked = {"model": "poet", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    # Of the second the prefix cache has as much as of the third.
    _, whole = (client.chat.completions.create(**asked) for _ in range(2))
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and sum(map(bool, pieces)) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == [
        "length"
    ]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_without_usage_has_none(client):
    chunks = list(client.completions.create(model="sql", prompt="a", max_tokens=3, temperature=0, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_completions_take_texts_and_ids_and_several(client, served, tokenizer):
    texts = ["Once upon", "The table has"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    wanted = [tokenizer.decode(expected(served, one, "sql", 9).token_ids, skip_special_tokens=True) for one in ids]
    for prompt, answers in ((texts[0], wanted[:1]), (ids[0], wanted[:1]), (texts, wanted), (ids, wanted)):
        found = client.completions.create(model="sql", prompt=prompt, max_tokens=9, temperature=0)
        assert [choice.text for choice in found.choices] == answers
        assert [choice.index for choice in found.choices] == list(range(len(answers)))
    chunks = client.completions.create(model="sql", prompt=texts, max_tokens=9, temperature=0, stream=True)
    pieces = ["", ""]
    for chunk in chunks:
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == wanted


def test_n_draws_several_and_a_seed_repeats_them(client):
    asked = {"model": "poet", "messages": MESSAGES, "max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 7}
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert [choice.message.content for choice in again.choices] == texts
    assert first.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert client.chat.completions.create(**{**asked, "seed": -7}).choices[0].message.content != texts[0]


def test_a_stop_string_ends_the_text_and_is_not_in_it(client):
    asked = {"model": "clerk", "prompt": "Once upon", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    found = client.completions.create(**asked, stop=stop).choices[0]
    assert found.text == whole[: whole.index(stop)] and found.finish_reason == "stop"
    streamed = "".join(
        chunk.choices[0].text for chunk in client.completions.create(**asked, stop=["never", stop], stream=True)
    )
    assert streamed == found.text


def test_logprobs_are_the_models(client, served, tokenizer):
    prompt = tokenizer("Once upon")["input_ids"]
    completion = expected(served, prompt, "sql", 6, logprobs=True)
    own = client.completions.create(model="sql", prompt=prompt, max_tokens=6, temperature=0, logprobs=0)
    logprobs = own.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(completion.logprobs)
    assert logprobs.tokens == [tokenizer.decode([token]) for token in completion.token_ids]
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:place])) for place in range(6)]
    top = client.completions.create(model="sql", prompt=prompt, max_tokens=6, temperature=1, seed=4, logprobs=3)
    found = top.choices[0].logprobs
    for text, logprob, likely in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert likely[text] == pytest.approx(logprob) and 3 <= len(likely) <= 4
        assert sorted(likely.values(), reverse=True)[0] >= logprob
    asked = {"model": "sql", "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "logprobs": True}
    content = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(content) == 5
    assert all(bytes(one.bytes).decode() == one.token and one.logprob <= 0 and not one.top_logprobs for one in content)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    more = client.chat.completions.create(**asked, top_logprobs=4).choices[0].logprobs.content
    assert [len(one.top_logprobs) for one in more] == [4] * 5 and [one.token for one in more] == [
        one.token for one in content
    ]
    assert all(one.top_logprobs[0].token == one.token for one in more), "it is greedy"
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in content]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in content])


def test_tools_reach_the_template(client, served, tokenizer):
    tool = {"type": "function", "function": {"name": "rows", "description": "Counts rows.", "parameters": {}}}
    template = served.served._tokenizer.chat_template
    marked = template + "{%- for tool in tools or [] %}{{ tool.function.name }}{%- endfor %}"
    served.served._tokenizer.chat_template = marked
    try:
        with_tools = client.chat.completions.create(model=BASE, messages=MESSAGES, tools=[tool], max_tokens=1)
        without = client.chat.completions.create(
            model=BASE, messages=MESSAGES, tools=[tool], tool_choice="none", max_tokens=1
        )
    finally:
        served.served._tokenizer.chat_template = template
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens == len(ids_of(tokenizer))


def test_parts_of_text_are_one_text(client):
    parts = [{"type": "text", "text": "How many rows "}, {"type": "text", "text": "has the table?"}]
    asked = {"model": "sql", "max_tokens": 6, "temperature": 0}
    found = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **asked)
    assert found.choices[0].message == client.chat.completions.create(messages=MESSAGES, **asked).choices[0].message


def test_what_is_null_is_left_out(client):
    nothing = dict.fromkeys(("temperature", "top_p", "n", "stream", "stop", "seed", "max_tokens", "logprobs"))
    found = client.completions.create(model="sql", prompt="a", extra_body=nothing)
    assert found.usage.completion_tokens <= 16


def test_a_choice_that_ends_early_is_told_at_once(client, served):
    asked = {"model": "poet", "prompt": "a", "max_tokens": 60, "temperature": 1.5, "n": 4, "seed": 3}
    whole = client.completions.create(**asked)
    stop = whole.choices[1].text[:6]
    seen = []
    for chunk in client.completions.create(**asked, stop=stop, stream=True):
        seen.append((chunk.choices[0].index, chunk.choices[0].finish_reason))
    assert sorted(index for index, reason in seen if reason) == [0, 1, 2, 3]
    assert seen.index((1, "stop")) < len(seen) / 2


def test_models_are_the_base_and_its_adapters(client):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == [BASE, *TENANTS]
    assert cards[BASE].parent is None and all(cards[name].parent == BASE for name in TENANTS)
    assert client.models.retrieve("sql") == cards["sql"] and client.models.retrieve(BASE) == cards[BASE]
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_requests_of_many_tenants_share_batches(client, served):
    before = served.served.engine.stats()
    streams = [
        client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=40, temperature=0, stream=True)
        for name in (BASE, *TENANTS)
    ]
    for stream in streams:
        assert sum(1 for _ in stream) > 2
    after = served.served.engine.stats()
    assert (after.segments - before.segments) / (after.steps - before.steps) > 1.5


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"model": "nobody"}, "model", "does not exist"),
        ({"model": f"{BASE}:nobody"}, "model", "does not exist"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"n": 17}, "n", "at most 16"),
        ({"n": 2, "temperature": 0}, None, "temperature"),
        ({"messages": []}, "messages", "at least 1"),
        ({"top_logprobs": 3}, None, "come with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"presence_penalty": 1}, "presence_penalty", "0"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text"),
        ({"extra_body": {"guided_json": {}}}, "guided_json", "unknown, or not served"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "text",
        ),
        ({"max_tokens": 100000}, None, "shorten"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "chat_template_kwargs", "not a client's"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs", "not a client's"),
        ({"messages": [{"role": 5, "content": "a"}]}, "messages", "valid string"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages", "give a text"),
        ({"extra_body": {"temperature": "0.5"}}, "temperature", "give a number"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, None, "set stream to true"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_openais_shape(client, change, param, says):
    asked = {"model": "sql", "messages": MESSAGES, "max_tokens": 4, **change}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked)
    error = caught.value
    assert error.status_code == (404 if param == "model" else 400)
    assert says in error.body["message"] and error.body["param"] == param
    assert error.body["type"] == "invalid_request_error" and set(error.body) == {"message", "type", "param", "code"}


def test_an_engine_that_is_full_says_when_to_come_again(client, served, monkeypatch):
    from lorakit.errors import EngineBusyError

    def full(*args, **kwargs):
        raise EngineBusyError("too much waits; try again in 3 s.", retry_after=3)

    monkeypatch.setattr(served.served.engine, "submit", full)
    with pytest.raises(openai.RateLimitError, match="too much waits") as caught:
        client.chat.completions.create(model="sql", messages=MESSAGES)
    assert caught.value.response.headers["retry-after"] == "3"


def test_an_adapter_that_fails_while_a_stream_runs_ends_it_with_an_error(client, served, monkeypatch, caplog):
    from lorakit.errors import BankCorruptedError

    real = served.served.engine.submit

    def failing(*args, **kwargs):
        handle = real(*args, **kwargs)
        handle.fail(BankCorruptedError("the adapter in /secret is damaged"))
        return handle

    monkeypatch.setattr(served.served.engine, "submit", failing)
    with pytest.raises(openai.APIError, match="cannot be served"):
        list(client.chat.completions.create(model="sql", messages=MESSAGES, stream=True))
    with pytest.raises(openai.InternalServerError, match="cannot be served") as caught:
        client.chat.completions.create(model="sql", messages=MESSAGES)
    assert "secret" not in str(caught.value) and caplog.text.count("/secret is damaged") == 2
