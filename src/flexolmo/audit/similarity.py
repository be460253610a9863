"""Similarity of two texts: one minus Levenshtein's distance over the longer length."""


def similarity(a: str, b: str) -> float:
    """1.0 for equal texts, 0.0 for texts that share nothing."""
    longest = max(len(a), len(b))
    return 1.0 if not longest else 1 - edit_distance(a, b) / longest


def edit_distance(a: str, b: str) -> int:
    """Least number of characters to insert, delete or replace to make `b` of `a`.

    A whole column of the table of distances is held as the bits of two integers, which say where it
    rises and where it falls. Source: Myers (1999) in the form of Hyyrö (2003).
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}  # by character, the bits of its places in `a`
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    every = (1 << len(a)) - 1
    last = 1 << len(a) - 1
    rises = every
    falls = 0
    distance = len(a)
    for character in b:
        equal = places.get(character, 0)
        vertical = equal | falls
        horizontal = (((equal & rises) + rises) ^ rises) | equal
        up = falls | (every & ~(horizontal | rises))
        down = rises & horizontal
        if up & last:
            distance += 1
        elif down & last:
            distance -= 1
        up = up << 1 | 1
        down <<= 1
        rises = every & (down | ~(vertical | up))
        falls = every & up & vertical
    return distance
