"""Words of users in charts: names of classes, runs and files."""


def chart_text(text: str, longest: int = 30) -> str:
    """A name as matplotlib shows it: whole, or both ends, which tell it from others like it.

    Its own reading is another: what is between two dollars is a formula, and what begins with an
    underscore is kept out of legends.

    Args:
        longest: the most characters.
    """
    if len(text) > longest:
        half = (longest - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
