"""Records -> documents: texts, prompts with answers, chats."""

import json
from collections.abc import Sequence
from typing import Any

from data_pipeline.corpus import CorpusConfig, SourceConfig
from data_pipeline.documents import Document


class BadRecordError(Exception):
    """A record that holds no document. `reason` is a word to count by; the text says what is wrong and what to do."""

    def __init__(self, reason: str, what: str):
        super().__init__(what)
        self.reason = reason


def decode(data: bytes, source: SourceConfig, subject: str = "") -> tuple[str, bool]:
    """The text that UTF-8 bytes hold, and whether invalid ones were replaced, as the source says.

    Args:
        subject: begins the error's text.

    Raises:
        BadRecordError: they are not UTF-8.
    """
    try:
        return data.decode(), False
    except UnicodeDecodeError as error:
        if source.invalid_utf8 == "replace":
            return data.decode(errors="replace"), True
        what = f"{subject}not UTF-8 at byte {error.start}; mend it, or set the source's invalid_utf8 to replace"
        raise BadRecordError("invalid_utf8", what) from None


def parse_json(text: str) -> Any:
    """A line of JSON.

    Raises:
        BadRecordError: it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRecordError("not_json", f"not JSON ({error}); every line must be one JSON object") from None
    except RecursionError:
        what = "JSON nested too deeply; every line must be one flat JSON object"
        raise BadRecordError("not_json", what) from None


class RecordParser:
    """Makes documents of the records of one source.

    Attributes:
        fields: those of a record that matter.
    """

    def __init__(self, config: CorpusConfig, index: int, name: str):
        self._fields = fields = config.sources[index]
        self._name = name
        self._text = self._fields.text_field
        self._prompt = self._fields.prompt_field
        self._messages = self._fields.messages_field
        self._url = self._fields.url_field
        named = (self._text, self._prompt, fields.answer_field, self._messages, self._url)
        self.fields = [name for name in named if name is not None]
        self._template = config.chat_template.split("{content}")

    def __call__(self, record: Any, origin: tuple[str, int]) -> Sequence[Document]:
        """The documents of a record, of a chat one for each of the assistant's turns.

        Raises:
            BadRecordError: it has none.
        """
        if type(record) is not dict:
            raise self._lacks_fields()
        url = record.get(self._url) or ""
        if type(url) is not str:
            raise _not_a_string(self._url, url)
        if self._messages in record:
            return self._chat(record[self._messages], origin, url)
        if self._prompt in record:
            return (self._answer(record, origin, url),)
        text = record.get(self._text)
        if type(text) is not str:
            if self._text in record:
                raise _not_a_string(self._text, text)
            raise self._lacks_fields()
        # Only texts outside ASCII can hold surrogates, and few are that.
        if not text.isascii():
            _check_surrogates(self._text, text)
        return (Document(text, "", origin, self._name, url),)

    def _answer(self, record: dict[str, Any], origin: tuple[str, int], url: str) -> Document:
        assert self._prompt is not None
        key = self._fields.answer_field
        if key not in record:
            raise self._lacks_fields()
        answer, prompt = (_string(record, field) for field in (key, self._prompt))
        if not answer:
            raise BadRecordError("empty_answer", f'"{key}" is empty; nothing would be learned from it')
        return Document(answer, prompt, origin, self._name, url)

    def _chat(self, messages: Any, origin: tuple[str, int], url: str) -> list[Document]:
        key, fields = self._messages, self._fields
        if not isinstance(messages, list):
            raise BadRecordError("wrong_type", f'"{key}" must be a list, not {type(messages).__name__}')
        before, after = self._template
        documents, history = [], ""
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not {fields.role_field, fields.content_field} <= message.keys():
                what = f'"{key}" {number}: needs the fields "{fields.role_field}" and "{fields.content_field}"'
                raise BadRecordError("missing_field", what)
            role, content = (
                _string(message, f, f'"{key}" {number}: ') for f in (fields.role_field, fields.content_field)
            )
            history += before.replace("{role}", role)
            if role == fields.assistant_role:
                if not content:
                    what = f'"{key}" {number}: "{fields.content_field}" is empty; nothing would be learned from it'
                    raise BadRecordError("empty_answer", what)
                documents.append(Document(content, history, origin, self._name, url))
            history += content + after.replace("{role}", role)
        if not documents:
            what = f'"{key}" has no turn of the role "{fields.assistant_role}"; nothing would be learned from it'
            raise BadRecordError("no_assistant_turn", what)
        return documents

    def _lacks_fields(self) -> BadRecordError:
        choices = [f'"{self._text}"']
        if self._prompt is not None:
            choices.append(f'"{self._prompt}" and "{self._fields.answer_field}"')
        if self._messages is not None:
            choices.append(f'"{self._messages}"')
        what = f"needs the fields {', or '.join(choices)}; mend it, or name the source's fields"
        return BadRecordError("missing_field", what)


def _string(record: dict[str, Any], key: str, where: str = "") -> str:
    value = record[key]
    if not isinstance(value, str):
        raise _not_a_string(key, value, where)
    _check_surrogates(key, value, where)
    return value


def _not_a_string(key: str, value: object, where: str = "") -> BadRecordError:
    return BadRecordError("wrong_type", f'{where}"{key}" must be a string, not {type(value).__name__}')


def _check_surrogates(key: str, value: str, where: str = "") -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        what = f'{where}"{key}" holds half of a surrogate pair, which no UTF-8 can hold; mend it'
        raise BadRecordError("surrogate", what) from None
