"""Whether two models speak of the same tokens."""

from __future__ import annotations

from typing import Any

from ..errors import InputError

PROBES = (
    "The quick brown fox can't jump over 1,234.5 lazy dogs!",
    "  two  spaces\n\n\ttabs, NEW lines\r\n and trailing ",
    "naïve café — 北京 Привет 🙂",
    "def f(x):\n    return {'a': x ** 2}\n",
)


def check_same_tokens(student: Any, teacher: Any, flag: str = "--student.path") -> None:
    """InputError unless two tokenizers give every text the same ids: a loss compares the two models' next tokens by id.

    Tables of logits may be padded to different sizes; the losses take the ids that both have.
    """
    if student.get_vocab() != teacher.get_vocab():
        ours, theirs = student.get_vocab(), teacher.get_vocab()
        odd = sorted(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word))
        raise InputError(
            f"expected one tokenizer for student and teacher, got {len(ours)} and {len(theirs)} tokens, of which {len(odd)} "
            f"differ, first {odd[0]!r}: their next-token distributions are over different things; take models of one family, "
            f"or a student made anew with the teacher's tokenizer ({flag})"
        )
    for text in PROBES:
        one, other = (t(text, add_special_tokens=False)["input_ids"] for t in (student, teacher))
        if one != other:
            raise InputError(
                f"expected one tokenizer for student and teacher, got the same tokens but other cuts: {text!r} is {one} and "
                f"{other}; take models of one family ({flag})"
            )
