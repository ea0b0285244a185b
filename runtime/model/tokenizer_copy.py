"""A tokenizer with settings of its own over another's vocabulary, which both share.

It does not know what is set.
Read first: a vocabulary with its merges is most of a tokenizer, some ten megabytes, and a tenth of a second to parse.
"""

from __future__ import annotations

import tokenizers


def copied(source: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer that gives the same ids as `source`, neither truncates nor pads, and changes no setting of it.

    Model, normalizer, pre-tokenizer, post-processor and decoder are the source's own objects; added tokens are entered
    anew, in the order of their ids, which gives them the same ones.
    """
    copy = tokenizers.Tokenizer(source.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        found = getattr(source, part)
        if found is not None:
            setattr(copy, part, found)
    added = source.get_added_tokens_decoder()
    for _, token in sorted(added.items()):
        (copy.add_special_tokens if token.special else copy.add_tokens)([token])
    assert copy.get_added_tokens_decoder() == added, "added tokens are numbered in the order in which they are entered"
    return copy
