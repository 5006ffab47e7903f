import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from moeforge.data.encode import Encoder
from moeforge.data.reading import Piece
from moeforge.errors import UserError


def encode(tokenizer, pieces: list[Piece]) -> list[list[int]]:
    return [ids.tolist() for ids, _, _ in Encoder(tokenizer, chat=False).encode(pieces)]


def test_eos_after_each_document_and_never_twice(tokenizer) -> None:
    eos = tokenizer.eos_token_id
    one, two = encode(tokenizer, [Piece("The dog", "a"), Piece("The dog<|endoftext|>", "b")])
    assert one == two == [*tokenizer("The dog")["input_ids"], eos]


def test_bos_only_where_the_tokenizer_puts_it(make_tokenizer) -> None:
    plain = make_tokenizer(bos_token="<s>")
    assert encode(plain, [Piece("dog", "a")])[0][0] != plain.bos_token_id
    adding = make_tokenizer(bos_token="<s>")
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    parts = encode(adding, [Piece("The", "a", last=False), Piece(" dog", "a"), Piece("fox", "b")])
    first = [[ids[0], ids[-1]] for ids in parts]
    assert first[0][0] == first[2][0] == adding.bos_token_id
    assert adding.bos_token_id not in parts[1]
    assert first[1][1] == first[2][1] == adding.eos_token_id
    assert adding.eos_token_id not in parts[0]


def test_empty_documents_stay_empty(tokenizer) -> None:
    parts = encode(tokenizer, [Piece("", "a"), Piece("dog", "b", last=False), Piece("", "b"), Piece("", "c")])
    assert [len(ids) > 0 for ids in parts] == [False, True, True, False]
    assert parts[2] == [tokenizer.eos_token_id]


def test_many_batches_are_what_one_by_one_gives(tokenizer) -> None:
    pieces = [Piece(f"document {i} of the lazy dog", "x") for i in range(2500)]
    together = encode(tokenizer, pieces)
    assert together[2400] == encode(tokenizer, pieces[2400:2401])[0]
    assert len(together) == 2500


def test_width_of_ids(tokenizer, make_tokenizer) -> None:
    assert Encoder(tokenizer, chat=False).dtype == np.uint16
    large = make_tokenizer()
    large.add_tokens([f"<{i}>" for i in range(65536)])
    assert Encoder(large, chat=False).dtype == np.uint32


def test_width_of_ids_with_a_gap(make_tokenizer) -> None:
    few = make_tokenizer()
    content = json.loads(few.backend_tokenizer.to_str())
    content["model"]["vocab"]["late"] = 70_000
    few._tokenizer = Tokenizer.from_str(json.dumps(content))
    assert len(few) < 65536 and Encoder(few, chat=False).dtype == np.uint32


def test_fingerprint_follows_the_vocabulary_and_not_the_last_call(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    before = Encoder(tokenizer, chat=False).fingerprint()
    tokenizer(["a", "bbb"], padding=False, truncation=True, max_length=2)
    assert Encoder(tokenizer, chat=False).fingerprint() == before
    tokenizer.add_tokens(["<new>"])
    assert Encoder(tokenizer, chat=False).fingerprint() != before


def test_tokenizer_without_eos_is_refused(make_tokenizer) -> None:
    with pytest.raises(UserError, match="no EOS"):
        Encoder(make_tokenizer(eos_token=None), chat=False)
