"""Damages to the structure of JSON: what is done to a value, at every place of a file."""

import json

HUGE = 10**400
CHANGES = {
    "missing": lambda value: [],
    "twice": lambda value: [value, value],
    "null": lambda value: ["null"],
    "true": lambda value: ["true"],
    "text": lambda value: ['"strange"'],
    "list": lambda value: [f"[{value}]"],
    "object": lambda value: [f'{{"a": {value}}}'],
    "empty list": lambda value: ["[]"],
    "empty object": lambda value: ["{}"],
    "negative": lambda value: ["-3"],
    "fraction": lambda value: ["0.5"],
    "huge": lambda value: [str(HUGE)],
    "infinite": lambda value: ["1e999"],
    "not a number": lambda value: ["NaN"],
    "deep": lambda value: ["[" * 3000 + "]" * 3000],
}


def places(value, place=()):
    """Every place in a nesting; of numbers in a list, the first."""
    yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*place, key))
    elif isinstance(value, list):
        numbers = all(isinstance(item, int | float) for item in value)
        for index, item in enumerate(value[:1] if numbers else value):
            yield from places(item, (*place, index))


def damaged(value, place, change):
    """JSON text of a nesting with a change at one place, or None where the text stays the same."""
    text = _text(value, place, CHANGES[change])
    return None if text is None or text == _text(value, None, None) else text


def _text(value, place, change):
    if place == ():
        changed = change(_text(value, None, None))
        return changed[0] if len(changed) == 1 else None
    inner = None if place is None else place[1:]

    def parts(pairs, write):
        for key, item in pairs:
            if place is not None and key == place[0]:
                if inner == ():
                    yield from (write(key, text) for text in change(_text(item, None, None)))
                    continue
                yield write(key, _text(item, inner, change))
            else:
                yield write(key, _text(item, None, None))

    if isinstance(value, dict):
        items = parts(value.items(), lambda key, text: f"{json.dumps(key)}: {text}")
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(parts(enumerate(value), lambda _, text: text)) + "]"
    return json.dumps(value)
